"""The oracle itself: its gradients against finite differences, its sum against its recurrence, φ against the plain power."""

from __future__ import annotations

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from bridge import cases, oracle, spec

CHECKED = ("gates", "gqa", "narrow_value", "degree_3", "degree_4", "degree_5_not_normalized", "not_causal_cross",
           "not_causal_state", "state_to_state", "state_not_normalized", "state_degree_4", "negative_scale_odd")  # fmt: skip


def small(name: str) -> cases.Case:
    case = cases.BY_NAME[name]
    return dataclasses.replace(case, b=min(case.b, 1), t=6, t_kv=None if case.t_kv is None else 8)


class OracleTest(parameterized.TestCase):
    @parameterized.parameters(*CHECKED)
    def test_gradients_match_finite_differences(self, name):
        case = small(name)
        arrays = case.make("float64")
        state = ("s0", "z0") if case.initial_state else ()

        def loss(inputs):
            result = oracle.power(
                inputs["q"], inputs["k"], inputs["v"], inputs.get("log_g"), **case.options(),
                initial_state=tuple(inputs[n] for n in state) or None,
            )  # fmt: skip
            parts = [(result.y, "dy"), (result.s, "ds"), (result.z, "dz")]
            return sum((x * inputs[upstream]).sum() for x, upstream in parts if x is not None)

        exact, step = case.exact(arrays), 1e-6
        for argument in ("q", "k", "v", "log_g", *state):
            if argument not in arrays:
                continue
            direction = np.random.default_rng(1).standard_normal(arrays[argument].shape)
            ahead, behind = ({**arrays, argument: arrays[argument] + sign * step * direction} for sign in (1, -1))
            difference = (loss(ahead) - loss(behind)) / (2 * step)
            np.testing.assert_allclose((exact[f"d{argument}"] * direction).sum(), difference, rtol=1e-6, atol=1e-8)

    @parameterized.parameters("gates", "gqa", "degree_1", "degree_3", "state_to_state", "state_degree_4", "mixed_decay")
    def test_recurrence_is_the_sum(self, name):
        case = cases.BY_NAME[name]
        arrays = case.make("float64")
        inputs = arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g")
        state = (arrays["s0"], arrays["z0"]) if case.initial_state else None
        options = {"deg": case.deg, "scale": case.scale, "normalize": case.normalize, "initial_state": state}
        summed = oracle.power(*inputs, **options, return_state=True)
        recurrent = oracle.power_recurrent(*inputs, **options)
        for got, want in zip(recurrent, summed, strict=True):
            self.assertLess(cases.relative_error(got, want), 1e-12)

    @parameterized.parameters((1, 8), (1, 24), (2, 8), (2, 32), (3, 4), (3, 12), (4, 2), (4, 8))
    def test_features_reproduce_the_power(self, deg, d):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, 5, d))
        multiplicity = spec.sympow_multiplicity(d, deg)
        product = (oracle.sympow(x, deg) * multiplicity * oracle.sympow(y, deg)).sum(-1)
        np.testing.assert_allclose(product, (x * y).sum(-1) ** deg, rtol=1e-9, atol=1e-9)
        self.assertLen(multiplicity, spec.state_rows(d, deg))
        np.testing.assert_array_equal(multiplicity, np.round(multiplicity))

    def test_layout_of_degree_2(self):
        """Block of tiles (I, J) holds x[8I + α] · x[8J + β] at row 8α + β."""
        x = np.random.default_rng(0).standard_normal(24)
        phi = oracle.sympow(x, 2).reshape(6, 8, 8)
        for n, (i, j) in enumerate([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]):
            np.testing.assert_array_equal(phi[n], np.outer(x[8 * i : 8 * i + 8], x[8 * j : 8 * j + 8]))
            self.assertEqual(spec.block_multiplicity(24, 2)[n], 1 if i == j else 2)

    def test_state_sizes(self):
        self.assertEqual([spec.state_size(d, 1, 2).rows for d in (32, 64, 128)], [640, 2304, 8704])
        heads = 12 * 12
        sizes = [heads * spec.state_size(64, 65, deg, itemsize=2).exact_bytes for deg in (2, 4, 6)]
        self.assertEqual([f"{size:.2g}" for size in sizes], ["3.9e+07", "1.4e+10", "2.2e+12"])

    def test_bound_check_can_fail(self):
        want = {"y": np.ones(4)}
        got = {"y": np.array([1, 1, 1, 1.001])}
        found = cases.errors(got, want, cases.BY_NAME["gates"], np.ones(4))
        with self.assertRaisesRegex(AssertionError, "y: 0.0005 > 1e-05"):
            cases.assert_within(found, {"y": 1e-5})
        self.assertEqual(cases.relative_error(np.array([np.nan]), np.ones(1)), float("inf"))


if __name__ == "__main__":
    absltest.main()
