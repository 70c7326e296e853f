"""What the garbage collector is told."""

import gc
import sys

from rto_fast.system.memory import kept_imports


def test_first_imports_are_no_work_for_the_garbage_collector(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    before = gc.get_freeze_count()
    with kept_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)


def test_imports_that_were_made_before_change_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", sys)
    before = gc.get_freeze_count()
    with kept_imports():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before
