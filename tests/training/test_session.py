"""What is agreed upon before a run starts, and how ranks leave together."""

import json
from dataclasses import replace
from typing import Any

import pytest

from megamoe.checkpoint.format import step_folder
from megamoe.config import from_dict
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.parallel.launch import read_launch, start
from megamoe.training.run_folder import RunFolder, write_json
from megamoe.training.session import agree, find_checkpoint, read_corpus, with_vocabulary
from tests.checkpoint.small import write_small
from tests.ranks import run_ranks
from tests.training.runs import toy_corpus, toy_run


def disagree(_: Any) -> list[str]:
    """Rank 1 alone is refused; then it goes on with the others."""
    world = start(read_launch())
    heard = []
    for place in (1, 0, None):

        def action(place: int | None = place) -> int:
            if world.rank == place:
                raise DataError(f"rank {place} lacks a file")
            return 10 * world.rank

        try:
            heard.append(str(agree(world, action)))
        except DataError as error:
            heard.append(str(error))
    return heard


def test_what_one_rank_refuses_is_refused_by_all():
    first, second = run_ranks(disagree, 2, None)
    assert first == ["rank 1 lacks a file", "rank 0 lacks a file", "0"]
    assert second == ["rank 1 lacks a file", "rank 0 lacks a file", "10"]


def test_vocabulary_is_that_of_the_data(tmp_path):
    corpus = toy_corpus(vocab_size=7)
    assert with_vocabulary(toy_run(tmp_path), corpus).model.vocab_size == 7
    with pytest.raises(ConfigError, match=r"^model.vocab_size = 9: toy text has 7 symbols; give 0 or 7$"):
        with_vocabulary(toy_run(tmp_path, model={"vocab_size": 9}), corpus)


def test_which_checkpoint_is_resumed(tmp_path):
    run = toy_run(tmp_path)
    folder = RunFolder.of(run)
    assert find_checkpoint(run, folder) is None
    never = toy_run(tmp_path, checkpoint={"resume": "never"})
    assert find_checkpoint(never, folder) is None

    for step in (5, 10):
        write_small(folder.checkpoints / step_folder(step), step=step)
    assert find_checkpoint(run, folder) == folder.checkpoints / step_folder(10)
    elsewhere = toy_run(tmp_path, name="other", checkpoint={"resume": str(folder.root)})
    assert find_checkpoint(elsewhere, RunFolder.of(elsewhere)) == folder.checkpoints / step_folder(10)
    with pytest.raises(
        ConfigError, match=r"^checkpoint.resume = 'never': .*toy holds a run; give another name"
    ):
        find_checkpoint(never, folder)

    for step in (5, 10):
        (folder.checkpoints / step_folder(step) / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"^checkpoint.resume = 'auto': no checkpoint in .* is complete"
    ):
        find_checkpoint(run, folder)


def test_a_run_is_finished_once_it_is_scored_and_drawn(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.is_scored(10)
    write_json(folder.results, {"steps": 10})
    assert not folder.is_scored(10)
    folder.plots.mkdir()
    folder.curves.touch()
    assert folder.is_scored(10)
    assert not folder.is_scored(20)


def test_a_policy_of_domains_wants_them_and_knows_how_many(tmp_path):
    router = {"router": {"name": "lms", "options": {"domains": 2}}}
    without = from_dict({"data": {"dataset": "text8"}, "moe": router})
    with pytest.raises(
        ConfigError, match=r"^data.domains = '': policy 'lms' learns matrices for each domain"
    ):
        read_corpus(without)
    for largest, known in ((2, True), (3, False)):
        spans = {"train": [[0, 1]], "valid": [[0, largest]], "test": [[0, 0]]}
        path = tmp_path / f"{largest}.json"
        path.write_text(json.dumps({"format": "megamoe domains 1", **spans}))
        run = replace(without, data=replace(without.data, domains=str(path)))
        if known:
            assert read_corpus(run)[1].domains_of("valid").largest == 2
        else:
            with pytest.raises(DataError, match=r"valid has domain 3, but moe\.router\.domains = 2"):
                read_corpus(run)
