"""Choosing an implementation: by argument, by block, by order of preference; never silently another one."""

from __future__ import annotations

import threading

import pytest

from bridge import spec

CALL = object()


def implementation(reason: str | None = None, device: str | None = None) -> spec.Implementation:
    def supports(call: object, on: str) -> str | None:
        assert call is CALL
        return reason if device is None or on == device else f"needs {device}, the arrays are on {on}"

    return spec.Implementation(lambda: None, lambda: None, supports)


@pytest.fixture
def choice():
    return spec.Choice({
        "op": {
            "fast": implementation(device="cuda"),
            "picky": implementation("dropout_p: not available"),
            "plain": implementation(),
        },
        "other": {"plain": implementation()},
    })  # fmt: skip


def test_best_that_supports_the_call(choice):
    assert choice.choose("op", CALL, None, "cpu") == "plain"
    choice = spec.Choice({"op": {"fast": implementation(), "plain": implementation()}})
    assert choice.choose("op", CALL, None, "cpu") == "fast"


def test_named_never_falls_back(choice):
    with pytest.raises(NotImplementedError) as caught:
        choice.choose("op", CALL, "picky", "cpu")
    text = str(caught.value)
    assert "implementation='picky' cannot serve this call: dropout_p: not available" in text
    assert "implementation='plain' would work" in text


def test_order_of_preference(choice):
    assert choice.choose("op", CALL, ["fast", "picky", "plain"], "cpu") == "plain"
    with pytest.raises(NotImplementedError, match="needs cuda.*dropout_p: not available"):
        choice.choose("op", CALL, ["fast", "picky"], "cpu")


def test_unknown_names(choice):
    with pytest.raises(ValueError, match="implementation='fats': expected one of 'fast', 'picky', 'plain', or None"):
        choice.choose("op", CALL, "fats", "cpu")
    with pytest.raises(ValueError, match="implementation='fats'"), choice.implementation("fats"):
        pass
    with pytest.raises(ValueError, match=r"implementation=\(\)"), choice.implementation([]):
        pass
    with pytest.raises(TypeError, match="implementation=1: expected one of .* got int"), choice.implementation(1):
        pass


def test_blocks_nest_and_are_undone(choice):
    with choice.implementation("plain"):
        with pytest.raises(RuntimeError), choice.implementation(["picky", "plain"]):
            assert choice.in_force() == ("picky", "plain")
            raise RuntimeError
        assert choice.in_force() == ("plain",)
        with choice.implementation(None):
            assert choice.in_force() is None
        with pytest.raises(NotImplementedError):
            choice.choose("op", CALL, "picky", "cpu")  # the argument overrides the block
    assert choice.in_force() is None


def test_blocks_hold_for_one_thread(choice):
    seen = []
    with choice.implementation("plain"):
        thread = threading.Thread(target=lambda: seen.append(choice.in_force()))
        thread.start()
        thread.join()
        assert choice.in_force() == ("plain",)
    assert seen == [None]
