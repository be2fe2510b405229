import functools, jax, jax.numpy as jnp, numpy as np, pytest, chex
import usp_jax
from tests.kernels.emulated_cudnn import emulated_cudnn as emulated_cudnn
from tests.oracle import expected, normal, results, assert_equal_to, Order
from tests.sampling import thinned

@pytest.mark.parametrize("layout", ["zigzag","contiguous","striped"])
@pytest.mark.parametrize("sched", ["unidirectional","bidirectional","all_gather","pass_q"])
def test_ring(emulated_cudnn, layout, sched):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    q, kv = (1, 64, 4, 16), (1, 64, 2, 16)
    *arrays, dout, dlse = normal(5, q, kv, kv, q, q[:3])
    order = Order(layout, mesh, 1, 64)
    want = expected(arrays, (dout, dlse), is_causal=True)
    attend = functools.partial(usp_jax.usp_attention, mesh=mesh, is_causal=True, layout=layout, implementation="cudnn", return_residual=True, ring_schedule=sched)
    got = jax.jit(lambda *a: results(attend, *a))([order.store(x) for x in arrays], [order.store(x) for x in (dout, dlse)])
    got = {k: order.restore(x) for k, x in got.items()}
    assert_equal_to(want, got, 1e-4)
