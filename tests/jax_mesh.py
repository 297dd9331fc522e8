"""What test_jax_mesh.py runs, in a process with four devices: softmaxlib.jax in jax.shard_map.

Sums over the mesh, and their gradients, are compared with those of one device. What every device
has alike (P()) is given next to what differs, and its gradient is the sum of the devices'.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import softmaxlib.jax as smj

jax.config.update("jax_enable_x64", True)
MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("i", "j"))
BOTH, ONE, ALIKE = P(("i", "j")), P("i"), P()

rng = np.random.default_rng(0)
x = rng.standard_normal((8, 5)) * 3
factors = rng.standard_normal((8, 5))
where = rng.random((8, 5)) > 0.3
classes = rng.integers(0, 5, 8)
shares = rng.random((8, 5))
weight = rng.random(5)


def over_mesh(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs))


def near(got, expected):
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree.map(equal, got, expected)


def check(function, operands, specs, argnums, prepare=lambda x: x):
    """Compare the sum of the function, and its gradients outside and inside of shard_map.

    prepare makes of x what all devices have of it together.
    """

    def total(x, *operands):
        return function(prepare(x), *operands).sum()

    def summed(*operands):
        return jax.lax.psum(function(*operands).sum(), ("i", "j"))

    expected = jax.value_and_grad(total, argnums)(*operands)
    of_mesh = over_mesh(summed, specs, ALIKE)
    near(jax.value_and_grad(of_mesh, argnums)(*operands), expected)
    inside = jax.value_and_grad(summed, argnums)
    near(over_mesh(inside, specs, (ALIKE, tuple(specs[n] for n in argnums)))(*operands), expected)


def finite(y):
    return jnp.where(jnp.isfinite(y), y, 0)


def of_one_axis(x):
    """Return rows that vary over the axis i alone, as the devices have them in their order."""
    return jnp.repeat(x.reshape(2, 2, 5), 2, axis=0).reshape(8, 5)


for name in ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax"):
    options = {"keepdims": True} if name == "logsumexp" else {}
    function = functools.partial(getattr(smj, name), **options)

    def f(x, t, where, factors, function=function):
        return finite(function(x, where=where, temperature=t)) * factors

    temperatures = rng.random((8, 1)) + 0.5
    check(f, (x, 0.7, where[:1], factors[:1]), (BOTH, ALIKE, ALIKE, ALIKE), (0, 1, 3))
    check(f, (x, temperatures, where, factors), (BOTH, BOTH, BOTH, BOTH), (0, 1, 3))
    operands = (x[:4], temperatures, where, factors)
    check(f, operands, (ONE, BOTH, BOTH, BOTH), (0, 1, 3), of_one_axis)

    def second(x, t, function=function):
        return jax.grad(lambda x: jnp.sin(function(x, temperature=t)).sum())(x) ** 2

    check(second, (x, 0.7), (BOTH, ALIKE), (0, 1))

    def in_control_flow(x, function=function):
        """A carry and branches, whose types must agree."""

        def step(carry, _):
            y = jax.lax.cond(carry[0, 0] > 0, lambda c: function(c) * c, lambda c: -c, carry)
            return y, None

        return jax.lax.scan(step, x, None, length=3)[0]

    rows = [in_control_flow(some) for some in np.split(x, 4)]
    near(over_mesh(in_control_flow, BOTH, BOTH)(x), np.concatenate(rows))
    near(over_mesh(jax.vmap(function), BOTH, BOTH)(x), function(x))
    near(over_mesh(function, ALIKE, ALIKE)(x), function(x))

for reduction, activation in ("none", "softmax"), ("sum", "stablemax"), ("mean", "softmax"):

    def loss(x, target, t, weight=None, where=None, reduction=reduction, activation=activation):
        options = {"weight": weight, "where": where, "temperature": t, "activation": activation}
        loss = smj.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, **options)
        return loss * len(x) if reduction == "mean" else loss

    check(loss, (x, classes, 0.7), (BOTH, BOTH, ALIKE), (0, 2))
    check(loss, (x, shares, 0.7), (BOTH, BOTH, ALIKE), (0, 1, 2))
    if reduction != "mean":  # else the devices' weights differ
        weighted = (x, np.arange(8) % 5, 0.7, weight, np.array([True] * 5))
        check(loss, weighted, (BOTH, BOTH, ALIKE, ALIKE, ALIKE), (0, 2))

for indices in classes, np.stack([classes, classes[::-1]], 1):

    def take(x, indices, t, where):
        return jnp.sin(finite(smj.take_log_softmax(x, indices, temperature=t, where=where)))

    check(take, (x, indices, 0.7, where[0]), (BOTH, BOTH, ALIKE, ALIKE), (0, 2))

print(smj.backend())
