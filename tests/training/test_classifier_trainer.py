"""Fine-tuning on one and two ranks: what is taken over, that ranks do not matter, and exact resume."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader, find_latest
from megamoe.errors import CheckpointError, ConfigError
from megamoe.parallel.launch import World, read_launch, start
from megamoe.training.classifier_trainer import ClassifierTrainer
from megamoe.training.evaluation import Evaluation
from megamoe.training.finetune import read_sentences
from tests.checkpoint.runs import differing
from tests.convert.tool import convert
from tests.ranks import run_ranks
from tests.training.classifiers import (
    LAST_STEP,
    build_classifier,
    classifier_run,
    fine_tune,
    train_language_model,
    write_sentences,
)
from tests.training.runs import FP32, Recorder

STAGE_0, STAGE_2, STAGE_3 = ({"zero_optimization": {"stage": stage}} for stage in (0, 2, 3))
# Options and DeepSpeed config by the number of ranks; all are the same run.
LAYOUTS: dict[int, dict[str, tuple[list[str], Any]]] = {
    1: {
        "one rank": ([], FP32),
        "stage 0": (["training.micro_batch_size=2", "training.activation_checkpointing=true"], STAGE_0),
    },
    2: {
        "experts spread": (["moe.ep_size=2"], FP32),
        "micro-batches": (["moe.ep_size=1", "training.micro_batch_size=1"], STAGE_2),
        "stage 3": (["moe.ep_size=1"], STAGE_3),
    },
}


def resume_twice(world: World, language: Path) -> dict[str, Any]:
    """An uncut run with memory and dropout, and one cut in the first epoch and in the second."""
    uncut = fine_tune(classifier_run(language, "uncut"), world)
    cut = classifier_run(language, "cut")
    folder = Path(cut.output_dir, "cut")
    pieces = [
        fine_tune(cut, world, cut_after=7),
        fine_tune(cut, world, cut_after=12, resume=find_latest(folder)),
        fine_tune(cut, world, resume=find_latest(folder)),
    ]
    return {
        "uncut": uncut.steps,
        "pieces": [piece.steps for piece in pieces],
        "evaluations": (described([uncut]), described(pieces)),
    }


def described(recorders: list[Recorder]) -> dict[int, dict[str, Any]]:
    def plain(evaluation: Evaluation) -> dict[str, Any]:
        return asdict(evaluation)

    return {step: plain(scored) for recorder in recorders for step, scored in recorder.evaluations}


def refusals(language: Path) -> dict[str, str]:
    """What is said when a run folder is gone on with in another way."""
    folder = Path(classifier_run(language, "uncut").output_dir)
    checkpoints = {"classifier": find_latest(folder / "uncut"), "language": language}
    said = {}
    for case, checkpoint, override in (
        ("batch", "classifier", "training.batch_size=8"),
        ("sentences", "classifier", "task.valid_fraction=0.3"),
        ("language", "language", "task.bucket=2"),
    ):
        run, sentences = read_sentences(
            classifier_run(language, "uncut", override, f"task.path={folder.parent / 'two files'}")
        )
        with pytest.raises(CheckpointError) as error:
            ClassifierTrainer.require_resumable(CheckpointReader(checkpoints[checkpoint]), run, sentences)
        said[case] = str(error.value)
    return said


def run_everything(folder: str) -> dict[str, Any]:
    world = start(read_launch())
    language = train_language_model(Path(folder) / "runs", world)
    result: dict[str, Any] = {"layouts": {}, "started": {}}
    for name, (overrides, ds) in LAYOUTS[world.world_size].items():
        run = classifier_run(language, name, *overrides)
        trainer = build_classifier(run, ds, world, Recorder())
        trainer.begin()
        trainer.save([Path(folder) / name])
        trainer.wait_for_save()
        recorder = fine_tune(run, world, ds)
        means = [float(world.mean(torch.tensor(step["loss"]))) for step in recorder.steps]
        result["layouts"][name] = (means, described([recorder]))
    result["resumed"] = resume_twice(world, language)
    result["refused"] = refusals(language)
    if world.world_size == 1:
        for name, recipe, override in (
            ("words", "reference", "training.max_steps=1"),
            ("scratch", "transfer", "task.from_scratch=true"),
        ):
            fine_tune(classifier_run(language, name, override, "training.max_steps=1", recipe=recipe), world)
        longer = ("task.tokens=words", "training.max_steps=60", "evaluation.every=60")
        fine_tune(classifier_run(language, "learned", *longer), world)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    result = {}
    for n_ranks in LAYOUTS:
        folder = tmp_path_factory.mktemp("finetune")
        write_sentences(folder / "sentences")
        write_sentences(folder / "two files")
        (folder / "two files/test.tsv").unlink()
        result[n_ranks] = folder, run_ranks(run_everything, n_ranks, str(folder))
    return result


EVERY_LAYOUT = [pytest.param(n, name, id=name) for n, names in LAYOUTS.items() for name in names]


@pytest.mark.parametrize(("n_ranks", "layout"), EVERY_LAYOUT)
def test_a_classifier_starts_from_all_that_it_shares_with_the_language_model(trained, n_ranks, layout):
    folder, _ = trained[n_ranks]
    language = CheckpointReader(folder / "runs/language/checkpoints" / step_folder(2))
    started = CheckpointReader(folder / layout)
    weights = set(started.names("weight"))
    head = {name for name in weights if name.startswith("head.")}
    assert len(head) == 4
    assert weights - head == {name for name in language.names("weight") if not name.startswith("output.")}
    for name in weights - head:
        assert torch.equal(started.tensor("weight", name), language.tensor("weight", name))
    assert started.names("buffer") == language.names("buffer")
    assert any("hypernet" in name for name in started.names("buffer"))
    assert started.tensor("weight", "head.output.weight").abs().min() > 0


@pytest.mark.parametrize(("n_ranks", "layout"), EVERY_LAYOUT)
def test_ranks_and_their_layout_do_not_change_the_run(trained, n_ranks, layout):
    expected, expected_scores = trained[1][1][0]["layouts"]["one rank"]
    for rank in trained[n_ranks][1]:
        losses, scores = rank["layouts"][layout]
        assert losses == pytest.approx(expected, abs=2e-5)
        assert scores.keys() == expected_scores.keys()
        for step, score in scores.items():
            assert score["tokens"] == expected_scores[step]["tokens"]
            assert score["nats"] == pytest.approx(expected_scores[step]["nats"], abs=2e-5)


@pytest.mark.parametrize("n_ranks", LAYOUTS)
def test_a_resumed_run_repeats_the_uncut_one_bit_for_bit(trained, n_ranks):
    folder, ranks = trained[n_ranks]
    for rank in ranks:
        resumed = rank["resumed"]
        uncut = {step["step"]: step for step in resumed["uncut"]}
        assert list(uncut) == list(range(1, LAST_STEP + 1))
        assert [piece[0]["step"] for piece in resumed["pieces"]] == [1, 6, 11]
        for piece in resumed["pieces"]:
            assert piece == [uncut[step["step"]] for step in piece]
        assert resumed["evaluations"][0] == resumed["evaluations"][1]
    last = [folder / "runs" / run / "checkpoints" / step_folder(LAST_STEP) for run in ("uncut", "cut")]
    assert differing(*last) == []
    assert CheckpointReader(last[0]).names("memory")


@pytest.mark.parametrize("n_ranks", LAYOUTS)
def test_what_is_trained_and_what_stays(trained, n_ranks):
    folder, _ = trained[n_ranks]
    language = CheckpointReader(folder / "runs/language/checkpoints" / step_folder(2))
    model = load_model(folder / "runs/uncut")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, language.tensor("buffer", name))
    for name, parameter in model.named_parameters():
        if not name.startswith("head.") and "router" not in name:
            assert not torch.equal(parameter, language.tensor("weight", name)), name


def test_an_export_is_the_classifier(trained, tmp_path):
    folder, _ = trained[1]
    convert("export", folder / "runs/uncut", tmp_path / "exported")
    ours, exported = load_model(folder / "runs/uncut"), load_model(tmp_path / "exported")
    inputs = torch.arange(12).view(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(exported(*inputs).logits_BC, ours(*inputs).logits_BC)
    card = (tmp_path / "exported/README.md").read_text()
    for shown in (
        "- text-classification\n",
        "sentence classifier, exported",
        "| Classes | 0, 1 |",
        "error rate",
    ):
        assert shown in card


def test_recipes_differ_in_what_is_taken_over(trained):
    folder, _ = trained[1]
    language = CheckpointReader(folder / "runs/language/checkpoints" / step_folder(2))
    attention = "layers.0.attention.output.weight"
    published, scratch = (find_latest(folder / "runs" / name) for name in ("words", "scratch"))
    words = CheckpointReader(published)
    assert words.shape("weight", "embedding.weights.0") != language.shape("weight", "embedding.weights.0")
    assert words.state.tokenizer["kind"] == "words"
    for reader, is_near in ((words, True), (CheckpointReader(scratch), False)):
        distance = (reader.tensor("weight", attention) - language.tensor("weight", attention)).abs().max()
        assert (distance < 0.02) == is_near  # Adam's first step moves a weight by at most lr


def test_it_learns_what_decides(trained):
    folder, _ = trained[1]
    results = json.loads((folder / "runs/learned/results.json").read_text())
    assert results["accuracy_by_k"]["4"] > 0.9


def test_going_on_in_another_way_is_refused(trained):
    said = trained[1][1][0]["refused"]
    assert said["batch"].startswith("training.batch_size = 8: checkpoint ")
    assert "was trained with 4" in said["batch"]
    assert "was trained on other sentences" in said["sentences"]
    assert "is a language model; give it as task.checkpoint" in said["language"]


def test_results_name_the_sentences(trained):
    folder, _ = trained[2]
    results = json.loads((folder / "runs/uncut/results.json").read_text())
    assert results["corpus"] == "SST-2 form in sentences"
    assert (results["sentences"], results["classes"], results["also_in_training"]) == (14, 2, 0)
    for k in ("1", "4"):
        low, high = results["interval_95_by_k"][k]
        assert 0 <= low <= results["accuracy_by_k"][k] <= high <= 1


def test_only_language_models_are_fine_tuned(trained):
    folder, _ = trained[1]
    with pytest.raises(
        CheckpointError, match=r"^task.checkpoint = .*/step-0+14': is a classifier of sst2; give a l"
    ):
        classifier_run(folder / "runs/uncut/checkpoints" / step_folder(LAST_STEP), "again")
    language = folder / "runs/language/checkpoints" / step_folder(2)
    with pytest.raises(
        ConfigError, match=r"^evaluation.max_tokens = 9: splits of sentences are scored as a "
    ):
        classifier_run(language, "cut", "evaluation.max_tokens=9")
    with pytest.raises(ConfigError, match=r"^data: is the text of the language model; set task.path"):
        classifier_run(language, "cut", "data.path=elsewhere")
