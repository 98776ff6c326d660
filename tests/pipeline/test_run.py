import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_json
from earlyexit_ssd.pipeline.run import Gate, GateCheck, RunFolder


def started(folder, *keys, finished=()):
    """A run with these settings, some of whose phases are finished."""
    run = RunFolder(folder)
    run.require_free(load_config(None, keys), resume=False)
    run.start(load_config(None, keys))
    for phase in finished:
        run.phase(phase).mkdir()
        write_json(run.phase(phase) / "gate.json", {"passed": True})
    return run


@pytest.mark.parametrize(
    ("before", "finished", "now", "continues"),
    [
        ("[baseline]", ("baseline",), "[baseline, exits]", True),
        ("[baseline, exits]", ("baseline", "exits"), "[baseline, exits, joint]", True),
        ("[baseline, exits, joint]", ("baseline", "exits"), "[baseline, exits]", True),
        ("[baseline]", ("baseline",), "[exits]", False),  # the branches would be on an untrained trunk
        ("[exits]", ("exits",), "[baseline, exits]", False),  # the model of exits would replace that of baseline
        ("[baseline, exits]", ("baseline", "exits"), "[baseline]", False),
    ],
)
def test_a_resumed_run_may_add_phases_or_remove_unfinished_ones_at_the_end(tmp_path, before, finished, now, continues):
    weights = ("MODEL.WEIGHTS", "trained.pth")
    run = started(tmp_path / "run", *weights, "PHASES", before, finished=finished)
    cfg = load_config(None, [*weights, "PHASES", now])
    if continues:
        run.require_free(cfg, resume=True)
        run.start(cfg)
        assert all(run.finished(phase) for phase in finished)
        return
    message = "the run to resume has PHASES = .*use the stored value, or choose another folder"
    with pytest.raises(EarlyExitError, match=message):
        run.require_free(cfg, resume=True)


def test_files_of_a_changed_phase_move_to_a_new_folder(tmp_path):
    run = started(tmp_path / "run")
    (run.phase("baseline") / "before_2").mkdir(parents=True)  # someone has deleted before_1
    for seed in (1, 2):
        (run.phase("baseline") / "last.pth").write_bytes(bytes(seed))
        run.start(load_config(None, ["BASELINE.EPOCHS", str(100 + seed)]))
    assert sorted(path.name for path in run.phase("baseline").iterdir()) == ["before_1", "before_2", "before_3"]


def test_an_undefined_figure_reaches_only_a_limit_of_0():
    assert GateCheck("precision", None, 0.0).passed and not GateCheck("precision", None, 0.1).passed


@pytest.mark.parametrize("name", ["metrics.json", "model.pth", "report.html"])
def test_other_results_are_not_replaced(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(EarlyExitError, match=rf"holds other results \({name}\); choose another folder"):
        started(tmp_path)


def test_a_failed_gate_gives_advice():
    error = Gate("exits", (GateCheck("x", 0.1, 0.2),), ("move it",)).failed()
    assert str(error) == "gate of phase exits failed: x 0.100 < 0.200"
    assert error.advice == ["  try: move it", "  or continue with --force, which every later report will mention"]
