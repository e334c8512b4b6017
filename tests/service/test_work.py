"""What a record keeps of a merge: a recipe or a configuration, told apart, with its models named by field."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from merging.errors import InputError
from merging.mergekit.detect import claims
from merging.recipe import Recipe
from service.jobs import Jobs
from service.records import new_record
from service.results import job_digest
from service.retention import Retention
from service.storage import Storage
from service.work import MAX_LAYERS, Configuration, document_of, kept, output_format

MODELS = {
    "merge_method": "slerp",
    "base_model": "a/base",
    "models": [{"model": "a/base"}, {"model": "a/other"}],
    "parameters": {"t": [0, 1]},
    "tokenizer": {"source": "a/words"},
}
SLICES = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a/b", "layer_range": [0, 4]}], "base_model": "a/b"},
        {"sources": [{"model": "c/d", "layer_range": [2, 6], "parameters": {"scale": 0.5}}]},
    ],
    "tokenizer_source": "c/d",
}


def test_references_are_found_by_field() -> None:
    assert Configuration.read(MODELS).references() == {
        "base_model": "a/base",
        "models[0].model": "a/base",
        "models[1].model": "a/other",
        "tokenizer.source": "a/words",
    }
    assert Configuration.read(SLICES).references() == {
        "slices[0].base_model": "a/b",
        "slices[0].sources[0].model": "a/b",
        "slices[1].sources[0].model": "c/d",
        "tokenizer_source": "c/d",
    }


@pytest.mark.parametrize("word", ["base", "union"])
def test_words_for_tokenizers_are_no_models(word: str) -> None:
    for more in ({"tokenizer_source": word}, {"tokenizer": {"source": word}, "tokenizer_source": None}):
        configuration = Configuration.read({**SLICES, **more})
        assert word not in configuration.references().values()
        assert configuration.renamed({word: "x/y"}) == configuration


def test_renaming_changes_references_and_nothing_else() -> None:
    before = Configuration.read(SLICES)
    after = before.renamed({"c/d": "c/d@1"})
    assert after.document["slices"][1]["sources"] == [
        {"model": "c/d@1", "layer_range": [2, 6], "parameters": {"scale": 0.5}}
    ]
    assert (after.document["tokenizer_source"], after.references()["slices[0].base_model"]) == (
        "c/d@1",
        "a/b",
    )
    assert after.renamed({"c/d@1": "c/d"}) == before


@pytest.mark.parametrize(
    "work",
    [
        Configuration.read(MODELS),
        Recipe.load({"merge_method": "ties", "models": [{"model": "a/b"}], "compat": "mergekit"}),
    ],
)
def test_what_is_kept_is_told_apart(work: Recipe | Configuration) -> None:
    assert kept(document_of(work)) == work
    expected = "checkpoint" if isinstance(work, Configuration) else "lora"
    assert output_format(document_of(work)) == expected


@pytest.mark.parametrize("method", [[], {}, 3, None])
def test_a_method_that_is_no_text_makes_no_configuration(method: Any) -> None:
    document = {"merge_method": method, "models": [{"model": "a/b"}]}
    assert not claims(document, lambda model: True)


def test_the_kind_of_the_models_decides_what_could_be_either() -> None:
    document = {"merge_method": "linear", "models": [{"model": "a/whole"}, {"model": "a/adapter"}]}
    assert claims(document, lambda model: True)
    assert not claims(document, "a/whole".__eq__)
    assert not claims({**document, "output": {"format": "checkpoint"}}, lambda model: True)


def test_seeds_that_are_not_given_are_zero() -> None:
    assert job_digest(Configuration.read(MODELS)) == job_digest(Configuration.read({**MODELS, "seed": 0}))
    assert job_digest(Configuration.read(MODELS)) != job_digest(Configuration.read({**MODELS, "seed": 1}))


def test_a_result_has_a_limited_number_of_layers() -> None:
    def stack(count: int) -> dict[str, Any]:
        part = {"sources": [{"model": "a/b", "layer_range": [0, 100]}]}
        return {"merge_method": "passthrough", "slices": [part] * count}

    Configuration.read(stack(MAX_LAYERS // 100))
    with pytest.raises(InputError) as caught:
        Configuration.read(stack(MAX_LAYERS // 100 + 1))
    assert caught.value.code == "mergekit_too_many_layers"


def test_a_configuration_is_repeated_as_it_was(jobs: Jobs) -> None:
    work = Configuration.read(SLICES)
    first = jobs.create("t", work, digest=job_digest(work), name="stack")
    jobs.cancel("t", first.id)
    again = jobs.repeat("t", first.id)
    assert (again.retry_of, again.name, again.digest) == (first.id, "stack", first.digest)
    assert kept(jobs.get("t", again.id).recipe) == work


def test_a_result_stays_while_a_configuration_reads_it(
    jobs: Jobs, storage: Storage, connection: redis.Redis
) -> None:
    old = jobs.submit(new_record("t", Configuration.read(SLICES), created_at="2026-01-01T00:00:00.000Z"))
    jobs.cancel("t", old.id)
    retention = Retention(storage, connection, 1e-9)
    reader = jobs.create("t", Configuration.read({**SLICES, "tokenizer_source": f"merges/{old.id}"}))
    assert retention.sweep() == []
    jobs.cancel("t", reader.id)
    assert old.id in retention.sweep()
