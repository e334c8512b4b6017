"""The state machine of a merge, as scripts that Redis runs atomically.

::

    queued -> running -> succeeded | failed
      |          |
      |          +-> cancelling -> cancelled
      |          +-> queued (for a worker with more memory)
      +-> cancelled

Every attempt to run a merge has an id. ``CLAIM`` makes an attempt the current one; ``REPORT`` and
``FINISH`` do nothing for an attempt that is no longer current. So a worker that was given up as dead, but
lives, can neither publish nor disturb: at most one result is ever published.

Keys of each script: the record (hash), its events (stream), the sets of unfinished and of unsaved merges,
the index of all merges (its name plus ``:state`` is the index of a state).
"""

from __future__ import annotations

EVENTS_KEPT = 1000
ENDED_SECONDS = 7 * 24 * 3600

_COMMON = f"""
local function event(kind, data)
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', {EVENTS_KEPT}, '*', 'event', kind, 'data', data)
end
local function become(state)
  local id, score = unpack(redis.call('HMGET', KEYS[1], 'id', 'score'))
  redis.call('ZREM', KEYS[5] .. ':' .. redis.call('HGET', KEYS[1], 'state'), id)
  redis.call('ZADD', KEYS[5] .. ':' .. state, score, id)
  redis.call('HSET', KEYS[1], 'state', state)
end
local function finish(state, moment, field, value, data, member)
  become(state)
  redis.call('HSET', KEYS[1], 'finished_at', moment, 'phase', state, 'message', '', field, value)
  if state == 'succeeded' then redis.call('HSET', KEYS[1], 'progress', '1') end
  event('state', data)
  redis.call('SREM', KEYS[3], member)
  redis.call('SADD', KEYS[4], member)
  redis.call('EXPIRE', KEYS[2], {ENDED_SECONDS})
end
local state, attempt = unpack(redis.call('HMGET', KEYS[1], 'state', 'attempt'))
if not state then return 'missing' end
"""

# ARGV: attempt, now, event. Answers 'claimed' or the state that forbids it.
CLAIM = (
    _COMMON
    + """
if state ~= 'queued' and state ~= 'running' then return state end
become('running')
redis.call('HSETNX', KEYS[1], 'started_at', ARGV[2])
redis.call('HSET', KEYS[1], 'attempt', ARGV[1], 'phase', 'starting', 'progress', '0', 'message', '')
redis.call('HINCRBY', KEYS[1], 'attempts', 1)
event('state', ARGV[3])
return 'claimed'
"""
)

# ARGV: attempt, phase, progress, message, event. Answers the state, or 'superseded'.
REPORT = (
    _COMMON
    + """
if attempt ~= ARGV[1] then return 'superseded' end
if state ~= 'running' then return state end
redis.call('HSET', KEYS[1], 'phase', ARGV[2], 'progress', ARGV[3], 'message', ARGV[4])
event('progress', ARGV[5])
return state
"""
)

# ARGV: attempt ('' for whoever supervises), new state, now, field, its JSON, event, tenant/merge.
# Answers 'finished', 'superseded', or the state that forbids it.
FINISH = (
    _COMMON
    + """
if ARGV[1] ~= '' and attempt ~= ARGV[1] then return 'superseded' end
if state == 'succeeded' or state == 'failed' or state == 'cancelled' then return state end
if ARGV[2] == 'succeeded' and state ~= 'running' then return state end
finish(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return 'finished'
"""
)

# ARGV: now, event of the cancellation, event of its end, the error, tenant/merge.
# Answers 'dequeued' for a merge that nobody ran and that has now ended, else the state.
CANCEL = (
    _COMMON
    + """
if state == 'queued' then
  finish('cancelled', ARGV[1], 'error', ARGV[4], ARGV[3], ARGV[5])
  return 'dequeued'
end
if state ~= 'running' then return state end
become('cancelling')
redis.call('HSET', KEYS[1], 'cancelling_at', ARGV[1])
event('state', ARGV[2])
return 'cancelling'
"""
)

# ARGV: attempt ('' for whoever supervises), bytes, message, event. The merge waits for a larger worker.
# Answers 'moved', 'superseded', or the state that forbids it.
MOVE = (
    _COMMON
    + """
if ARGV[1] ~= '' and attempt ~= ARGV[1] then return 'superseded' end
if state ~= 'running' then return state end
become('queued')
redis.call('HSET', KEYS[1], 'memory_bytes', ARGV[2], 'phase', 'queued', 'progress', '0', 'message', ARGV[3])
event('state', ARGV[4])
return 'moved'
"""
)

# Keys: the record, the set of unsaved merges. ARGV: tenant/merge, the push as it was saved ('' if there is
# none). The end is in storage; if the push has moved on since, it is to be saved once more.
# Answers whether the end is to be counted, which it is once.
SETTLED = f"""
local state, push = unpack(redis.call('HMGET', KEYS[1], 'state', 'push'))
if (push or '') == ARGV[2] or not state then
  redis.call('SREM', KEYS[2], ARGV[1])
else
  redis.call('SADD', KEYS[2], ARGV[1])
end
if not state then return 0 end
redis.call('EXPIRE', KEYS[1], {ENDED_SECONDS})
return redis.call('HSETNX', KEYS[1], 'counted', '1')
"""
