"""``megamoe finetune`` as a user calls it: from a run on two ranks, stopped, gone on with, and scored."""

import json
import signal
from pathlib import Path

import pytest

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.data.samples import read_sample
from megamoe.training.metrics_file import read_metrics
from tests.cli.conftest import Done, megamoe
from tests.processes import PATIENCE_SECONDS, ranks, wait_until

pytestmark = pytest.mark.distributed

LAST_STEP = 60
FINETUNE = ("finetune", "--task", "sst2", "--checkpoint", "runs/toy/checkpoints/step-000000006")
QUICK = (
    f"training.max_steps={LAST_STEP}", "training.batch_size=8", "evaluation.every=0", "evaluation.top_ks=2,4",
    "checkpoint.every=0", "logging.every=1", "logging.tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier(launched: Done, project: Path) -> Path:
    """On two ranks and the bundled sentences; stopped by a signal, and gone on with by the same command."""
    run = project / "runs/sst2-hyper"
    for is_stopped in (True, False):
        with ranks(2, *FINETUNE, *QUICK, "--deepspeed_config", "fp32.json", folder=project) as processes:
            if is_stopped:
                wait_until(
                    lambda: (run / "metrics.jsonl").exists() and bool(read_metrics(run / "metrics.jsonl"))
                )
                processes[1].send_signal(signal.SIGUSR1)
            said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
            codes = [process.returncode for process in processes]
        assert codes == ([75, 75] if is_stopped else [0, 0]), said
    assert "(resuming at step " in said[0][0]
    return run


def test_a_stopped_run_goes_on_to_its_figures(classifier: Path) -> None:
    lines = read_metrics(classifier / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, LAST_STEP + 1))
    results = json.loads((classifier / "results.json").read_text())
    assert results["corpus"] == "sentence polarity v1.0"
    assert (results["sentences"], results["classes"], set(results["accuracy_by_k"])) == (1066, 2, {"2", "4"})
    config = json.loads((classifier / "config.json").read_text())
    assert config["task"]["checkpoint"] == "runs/toy/checkpoints/step-000000006"
    assert config["task"]["labels"] == ["0", "1"]
    assert (classifier / "plots/curves.png").stat().st_size > 10_000


def test_scoring_it_gives_the_figures_of_the_run(classifier: Path, project: Path) -> None:
    reported = json.loads((classifier / "results.json").read_text())
    scored = megamoe("evaluate", "runs/sst2-hyper/best", "--json", folder=project)
    assert scored.code == 0, scored.errors
    figures = json.loads(scored.output)
    assert figures["loss_by_k"] == pytest.approx(reported["loss_by_k"], abs=1e-5)
    same = ("corpus", "split", "sentences", "classes", "also_in_training")
    assert [figures[name] for name in same] == [reported[name] for name in same]


def test_sentences_that_it_was_trained_on_are_not_scored(classifier: Path, project: Path) -> None:
    """As those of the development set of SST-2 are, which the bundled sentences are the source of."""
    header, *lines = read_sample("sentence-polarity.train.tsv").decode().splitlines()
    rows = {
        "train": [f"only {i}\t1" for i in range(30)],
        "dev": [line.replace("(", "-LRB-") for line in lines[:50]],
    }
    (project / "sst2").mkdir()
    for split, content in rows.items():
        (project / f"sst2/{split}.tsv").write_text("\n".join([header, *content]) + "\n")
    refused = megamoe("evaluate", "runs/sst2-hyper/best", "task.path=sst2", folder=project)
    assert refused.code == 2
    assert refused.errors == (
        "megamoe: error: task.max_overlap = 0.01: 50 of the 50 sentences of the test split of SST-2 form in"
        " sst2 were trained on, so its accuracy would say nothing; score other ones\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing"], "missing"),
        (["--checkpoint", "runs/sst2-hyper"], "is a classifier of sst2; give a language model"),
        (["--data", "missing"], "task.path = 'missing': is no folder; give the folder with train.tsv"),
        (["moe.n_experts=8"], "moe.n_experts = 8: checkpoint 'runs/toy/checkpoints/step-000000006' was"),
        (["training.batch_size=10000"], "training.batch_size = 10000: there are 8530 sentences to train on"),
    ],
    ids=["no checkpoint", "classifier", "no data", "other model", "batch"],
)  # fmt: skip
def test_refusals_write_nothing(classifier: Path, project: Path, arguments: list[str], message: str) -> None:
    refused = megamoe(*FINETUNE, *QUICK, "name=refused", *arguments, folder=project)
    assert refused.code == 2, refused.output
    assert message in refused.errors
    assert refused.errors.count("\n") == 1
    assert not (project / "runs/refused").exists()


def test_a_classifier_is_no_start_for_a_language_model(classifier: Path, project: Path) -> None:
    last = CheckpointReader(classifier / "checkpoints" / step_folder(LAST_STEP)).folder
    refused = megamoe(
        "train", "--config", "toy.toml", "name=refused", f"checkpoint.resume={last}", folder=project
    )
    assert refused.code == 2
    assert "head." in refused.errors or "output." in refused.errors
    refused = megamoe("train", "--config", "runs/sst2-hyper/config.json", "name=refused", folder=project)
    assert refused.code == 2
    assert "task.name = 'sst2': is what megamoe finetune trains; leave it out here" in refused.errors
    assert not (project / "runs/refused").exists()
