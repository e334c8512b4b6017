"""The work-horse: a fresh process that runs one job and ends. It dies with its worker.

Everything it needs to know is in its environment, which other users cannot read.
"""

from __future__ import annotations

import os
import sys

from rq.executions import Execution
from rq.serializers import JSONSerializer

from service import deathsig
from service.broker import connect
from service.logs import configure
from service.settings import load_settings
from workers import environment as env
from workers.job import MergeJob
from workers.memory import confine
from workers.queue import ReliableQueue
from workers.warm import await_job
from workers.worker import MergeWorker


def main() -> int:
    """Run the job named by the environment; RQ ends the process with the job."""
    deathsig.die_with_parent(int(os.environ[env.WORKER_PID]))
    configure()
    settings = load_settings()
    if settings.worker_memory is not None and os.environ.get(env.DEVICE) == "cpu":
        confine(int(settings.worker_memory))
    if env.WARM in os.environ:
        job_names = await_job()
        if job_names is None:
            return 0
        os.environ.update(job_names)
    connection = connect(settings, patient=True)
    worker = MergeWorker([], name=os.environ["RQ_WORKER_ID"], connection=connection, prepare_for_work=False)
    job = MergeJob.fetch(os.environ["RQ_JOB_ID"], connection=connection, serializer=JSONSerializer)
    queue = ReliableQueue(
        os.environ[env.QUEUE], connection=connection, job_class=MergeJob, serializer=JSONSerializer
    )
    execution = Execution.fetch(os.environ["RQ_EXECUTION_ID"], job.id, connection=connection)
    execution._job = job
    worker.execution = execution
    worker.main_work_horse(job, queue)
    return 1


if __name__ == "__main__":
    sys.exit(main())
