"""Progress without tqdm."""

import itertools

from earlyexit_ssd import progress as module


def test_lines_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(module, "tqdm", None)
    clock = itertools.count(0, 4)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))  # 4 s an item
    assert list(module.progress(range(6), desc="watch", total=6, unit="frame")) == [*range(6)]
    module.write_line("found")
    lines = ["watch: 3/6, 0.2 frame/s", "watch: 6/6, 0.2 frame/s", "found"]
    assert capsys.readouterr().err.splitlines() == lines


def test_no_output_without_a_description(monkeypatch, capsys):
    monkeypatch.setattr(module, "tqdm", None)
    clock = itertools.count(0, 100)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with module.progress(desc=None) as bar:
        bar.update()
    assert bar.n == 1 and capsys.readouterr().err == ""
