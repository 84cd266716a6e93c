"""Kernels: equal to their references when interpreted, lowered for TPU without one, picked in one place."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

import caldera_jax as cj
from caldera_jax import incoherence, kernels, lattice
from caldera_jax.kernels import e8p, hadamard, matmul

STAGES = {2: (1.0,), 4: (1.0, 1 / 3.45), 16: None}
CALL = "tpu_custom_call"
FAST = {"xla_backend_optimization_level": 0}  # interpreted kernels run for milliseconds and compile for seconds
ROUNDING = {jnp.dtype(jnp.float32): 1e-6, jnp.dtype(jnp.bfloat16): 1e-2, jnp.dtype(jnp.float16): 1e-3}


def _gaussian(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(matrices.gaussian(int(np.prod(shape[:-1])), shape[-1], seed).reshape(shape), dtype)


def _coded(bits, rows, width, seed):
    """Random codes as ``linear.Packed`` stores them; at 16 bits the matrix itself."""
    if bits == 16:
        return _gaussian(rows, width, seed=seed, dtype=jnp.float16)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, -(-width // 8) * bits), dtype=np.uint8)
    return matmul.Packed(jnp.asarray(codes), jnp.asarray(rng.uniform(0.5, 2, (1, 1)), jnp.float32))


@cache
def _layer(m, n, k, bits):
    """Parts and stages of a layer: bits of Q, of L and of R."""
    q, left, right = bits
    factors = (_coded(left, k, m, 2), _coded(right, k, n, 3)) if k else (None, None)
    return (_coded(q, m, n, 1), *factors), tuple(STAGES[b] for b in bits)


DECODE = jax.jit(matmul.decode, static_argnums=(1, 2, 3))


def _exact(x, parts, stages, m):
    """``matmul.multiply`` in NumPy, float64."""
    q, left_t, right = (None if part is None else np.asarray(DECODE(part, stage, width, jnp.float32), np.float64)
                        for part, stage, width in zip(parts, stages, (x.shape[1], m, x.shape[1]), strict=True))
    x = np.asarray(x.astype(jnp.float32), np.float64)
    return x @ q.T + (0 if left_t is None else (x @ right.T) @ left_t)


def _interpret(f, *args, **static):
    """The interpreted kernel."""
    return jax.jit(lambda *args: f(*args, interpret=True, **static), compiler_options=FAST)(*args)


def _modules(f, *args, **options):
    """The program lowered for each platform, on a machine without them; the checks refuse calls of unstable format."""
    export = lambda platform: jax.export.export(jax.jit(f), platforms=[platform], **options)(*args)
    return {platform: export(platform).mlir_module() for platform in ("tpu", "cuda", "cpu")}


def _assert_lowered(modules):
    """The kernel on a TPU, plain JAX elsewhere."""
    assert {platform: CALL in module for platform, module in modules.items()} == {
        "tpu": True, "cuda": False, "cpu": False}


# ---- decode and encode

def test_every_code_decodes_to_its_codeword():
    table = jnp.asarray(e8p.codeword_words())
    nibbles = e8p.nibbles(jnp.arange(1 << 16, dtype=jnp.int32), lambda which, byte: table[which, byte])
    decoded = jnp.stack([e8p.entry(nibbles, i) for i in range(8)], axis=1)
    np.testing.assert_array_equal(decoded, lattice.e8p_codewords())


def test_bits_above_the_code_do_not_matter():
    table, codes = jnp.asarray(e8p.codeword_words()), jnp.arange(0, 1 << 16, 7, dtype=jnp.int32)
    decode = lambda code: e8p.nibbles(code, lambda which, byte: table[which, byte])
    np.testing.assert_array_equal(decode(codes | -0x50000), decode(codes))


def test_encoder_finds_the_codes_and_values_of_the_reference():
    for shape, dtype in (((3, 5, 16), jnp.bfloat16), ((300, 8), jnp.float32)):
        x = 1.5 * _gaussian(*shape, dtype=dtype)
        values, codes = _interpret(e8p.pallas, x)
        wanted, wanted_codes = jax.jit(e8p.reference)(x)
        assert values.dtype == dtype and codes.dtype == jnp.uint16
        np.testing.assert_array_equal(codes, wanted_codes)
        np.testing.assert_array_equal(values, wanted)


def test_the_encoder_of_a_gpu_finds_them_too():
    from jax.experimental.pallas import mosaic_gpu
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip("Mosaic's interpreter for GPU kernels came with JAX 0.11")
    x = 1.5 * _gaussian(7, 5, 40, dtype=jnp.bfloat16)  # 175 vectors: a block of 128, and a part of one
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams()):
        values, codes = e8p.mosaic(x)
    wanted, wanted_codes = jax.jit(e8p.reference)(x)
    assert values.dtype == x.dtype and codes.dtype == jnp.uint16
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(values, wanted)


# ---- multiply

CASES = {  # b, m, n, k, bits of Q, L and R, dtype of x
    "1 x 1": (1, 1, 1, 1, (2, 4, 4), jnp.float32),
    "five rows, odd sizes": (5, 43, 21, 3, (2, 16, 4), jnp.float32),
    "more than a tile each way": (1, 1100, 2100, 20, (2, 4, 4), jnp.bfloat16),
    "wide, several batch tiles": (300, 24, 1100, 4, (4, 4, 2), jnp.float32),
    "tall, no factors": (20, 1100, 40, 0, (2, 4, 4), jnp.float16)}


@pytest.mark.parametrize("name", CASES)
def test_product_from_the_codes_is_the_product_with_the_decoded_matrix(name):
    b, m, n, k, bits, dtype = CASES[name]
    (parts, stages), x = _layer(m, n, k, bits), _gaussian(b, n, dtype=dtype)
    assert matmul.supported(x, parts, stages)
    y = _interpret(matmul.pallas, x, parts, stages=stages, m=m)
    assert y.shape == (b, m) and y.dtype == dtype
    wanted = _exact(x, parts, stages, m)
    error = np.linalg.norm(np.asarray(y.astype(jnp.float32), np.float64) - wanted)
    assert error <= ROUNDING[y.dtype] * np.linalg.norm(wanted)


def test_reference_decodes_bytes_and_words_alike():
    (parts, stages), x = _layer(43, 21, 3, (2, 4, 4)), _gaussian(5, 21)
    as_words = tuple(part._replace(codes=matmul.words(part.codes)) for part in parts)
    assert as_words[0].codes.shape == (43, 2) and matmul.words(as_words[0].codes) is as_words[0].codes  # 6 bytes a row
    run = jax.jit(partial(matmul.reference, stages=stages, m=43))
    np.testing.assert_array_equal(run(x, as_words), run(x, parts))
    y = _interpret(matmul.pallas, x, as_words, stages=stages, m=43)
    np.testing.assert_allclose(y, run(x, parts), atol=1e-4)


@pytest.mark.parametrize("bits", [(2, 4, 4), (4, 16, 4)])
def test_the_large_tiles_of_an_accelerator_give_the_product_of_the_small_ones(bits, monkeypatch):
    (parts, stages), x = _layer(1100, 600, 3, bits), _gaussian(5, 600)
    run = lambda: jax.jit(partial(matmul.reference, stages=stages, m=1100)).lower(x, parts).compile()
    small = run()
    monkeypatch.setattr(matmul, "on_cpu", lambda: False)
    jax.clear_caches()  # the codewords' call is traced anew
    large = run()
    assert large.as_text().count("while(") <= small.as_text().count("while(")
    np.testing.assert_allclose(large(x, parts), small(x, parts), rtol=1e-5, atol=1e-4)


@cache
def _compressed():
    w, h = matrices.gaussian(24, 40, 0), matrices.hessian("geometric", 40, 0)
    config = cj.CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1)
    return cj.compress_matrix(jax.random.key(0), w.astype(np.float32), h.astype(np.float32), config)[0]


def _parts(layer):
    return tuple(None if part is None else matmul.Packed(*part) for part in (layer.q, layer.left_t, layer.right))


def test_kernel_is_apply_on_a_compressed_layer():
    layer, x = _compressed(), _gaussian(5, 40)
    sides, stages = layer.sides(x.dtype), (STAGES[2], STAGES[4], STAGES[4])
    y = _interpret(matmul.pallas, incoherence.forward(sides.right, x), _parts(layer), stages=stages, m=24)
    y = incoherence.backward(sides.left, y)
    np.testing.assert_allclose(y, cj.apply(layer, x), atol=2e-5)
    np.testing.assert_allclose(y, x @ layer.dense().T, atol=2e-5)


def test_what_the_kernel_does_not_hold_goes_to_the_reference():
    (parts, stages), x = _layer(43, 21, 3, (2, 4, 4)), _gaussian(5, 21)
    scales = parts[0]._replace(scale=jnp.ones((43, 2), jnp.float32))
    cases = [(x.astype(jnp.float64), parts, stages), (x[:0], parts, stages), (x, (scales, *parts[1:]), stages),
             (x, (None, *parts[1:]), stages), (x, (_gaussian(43, 21), *parts[1:]), (None, *stages[1:]))]
    for case in cases:
        assert not matmul.supported(*case)
    multiply = jax.jit(kernels.use("pallas")(partial(matmul.multiply, stages=stages, m=43)))
    y = multiply(x.astype(jnp.float64), jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, parts))
    np.testing.assert_allclose(y, _exact(x, parts, stages, 43), atol=1e-4)  # the scales were rounded differently
    _, left, right = (DECODE(p, s, w, x.dtype) for p, s, w in zip(parts, stages, (21, 43, 21), strict=True))
    np.testing.assert_allclose(multiply(x, (None, *parts[1:])), (x @ right.T) @ left, rtol=1e-5, atol=1e-4)


# ---- Hadamard

@pytest.mark.parametrize(("shape", "dtype"), [((3, 1), jnp.float32), ((2, 3, 12), jnp.float32), ((5, 576), jnp.float32),
                                              ((1, 4096), jnp.bfloat16), ((11008,), jnp.float16)])
def test_transform_and_inverse_are_those_of_hadamard(shape, dtype):
    x = _gaussian(1, *shape, dtype=dtype)[0]
    for inverse in (False, True):
        y = _interpret(hadamard.pallas, x, inverse=inverse)
        assert y.shape == shape and y.dtype == dtype
        wanted = hadamard.reference(x.astype(jnp.float32), inverse)
        difference = jnp.linalg.norm((y.astype(jnp.float32) - wanted).ravel())
        assert difference <= ROUNDING[y.dtype] * jnp.linalg.norm(wanted.ravel())


def test_the_two_orders_multiply_to_n_and_odd_sizes_have_none():
    for n in (1, 2, 12, 576, 1536, 4096, 5120, 8192, 11008, 13824, 14336, 28672, 65536):
        a, c = hadamard.split(n)
        assert a * c == n and max(a, c) <= 256
    assert hadamard.split(9) is None and hadamard.split(1 << 17) is None
    with kernels.use("pallas"):
        x = _gaussian(2, 9)
        np.testing.assert_array_equal(hadamard.transform(x), hadamard.reference(x))


# ---- lowering and the choice of a backend

def test_encoder_lowers_for_tpu_and_is_plain_jax_elsewhere():
    _assert_lowered(_modules(e8p.encode, jax.ShapeDtypeStruct((96, 64), jnp.float32)))


def test_encoder_lowers_to_a_mosaic_kernel_where_the_gpu_takes_one(monkeypatch):
    for capabilities, runs in ((["8.9"], False), (["9.0", "9.0"], True), (["12.0"], True), (["9.0", "8.0"], False)):
        gpus = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
        with monkeypatch.context() as patched:
            patched.setattr(jax, "devices", lambda gpus=gpus: gpus)
            assert kernels._mosaic_runs() == runs
    assert not kernels._mosaic_runs()  # here
    monkeypatch.setattr(kernels, "_mosaic_runs", lambda: True)
    unstable = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    for dtype, exact in ((jnp.bfloat16, False), (jnp.float32, False), (jnp.float64, True)):
        modules = _modules(lambda x: jax.vmap(e8p.encode)(x), jax.ShapeDtypeStruct((3, 5, 16), dtype),
                           disabled_checks=unstable)
        found = {platform for platform, module in modules.items() if "mosaic_gpu_v2" in module}
        assert found == (set() if exact else {"cuda"})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("b", "bits"), [(1, (2, 4, 4)), (512, (4, 16, 16))])
def test_multiply_lowers_for_tpu_and_is_plain_jax_elsewhere(b, bits, dtype):
    m, n, k = 4096, 11008, 64
    part = lambda bits, rows, width: jnp.zeros((rows, width), jnp.float16) if bits == 16 else matmul.Packed(
        jnp.zeros((rows, width * bits // 8), jnp.uint8), jnp.ones((1, 1), jnp.float32))
    parts = (part(bits[0], m, n), part(bits[1], k, m), part(bits[2], k, n))
    stages = tuple(STAGES[b] for b in bits)
    _assert_lowered(_modules(lambda x, parts: matmul.multiply(x, parts, stages, m),
                             jax.ShapeDtypeStruct((b, n), dtype), parts))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_transform_lowers_for_tpu_and_is_plain_jax_elsewhere(dtype):
    _assert_lowered(_modules(hadamard.transform, jax.ShapeDtypeStruct((8, 4096), dtype)))


def test_the_switch_turns_kernels_off_and_interprets_them_on_the_cpu(monkeypatch):
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    off = _modules(kernels.use("jax")(hadamard.transform), x)
    assert not any(CALL in module for module in off.values())
    calls = lambda: str(jax.make_jaxpr(lambda x: hadamard.transform(x))(_gaussian(4, 64))).count("interpret=True")
    assert kernels.mode() == "auto" and not calls()
    monkeypatch.setenv("CALDERA_KERNELS", "pallas")
    assert kernels.mode() == "pallas" and calls()
    with kernels.use("auto"):
        assert not calls()
    monkeypatch.setenv("CALDERA_KERNELS", "triton")
    with pytest.raises(ValueError, match="unknown kernel mode 'triton'.*auto, jax, pallas"):
        hadamard.transform(_gaussian(4, 64))
    with pytest.raises(ValueError, match="unknown kernel mode 'gpu'"), kernels.use("gpu"):
        pass


def test_float64_meets_no_kernel():
    with kernels.use("pallas"):
        for f in (e8p.encode, hadamard.transform):
            assert "pallas_call" not in str(jax.make_jaxpr(lambda x, f=f: f(x))(_gaussian(4, 64, dtype=np.float64)))


def test_interpreted_kernels_differentiate_and_batch_as_their_references():
    (parts, stages), x = _layer(43, 21, 3, (2, 4, 16)), _gaussian(2, 5, 21)
    kernel = partial(matmul.multiply, parts=parts, stages=stages, m=43)
    plain = partial(matmul.reference, parts=parts, stages=stages, m=43)
    loss = lambda f: lambda x: jnp.sum(f(x) ** 2)
    with kernels.use("pallas"):
        every = lambda x: (jax.vmap(kernel)(x[:2]), jax.grad(loss(kernel))(x[0]), jax.jvp(kernel, (x[0],), (x[1],))[1])
        batched, gradient, tangent = jax.jit(every, compiler_options=FAST)(x)
        turned = jax.jit(jax.grad(loss(hadamard.transform)), compiler_options=FAST)(_gaussian(2, 12))
    np.testing.assert_allclose(batched, jnp.stack([plain(row) for row in x[:2]]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, jax.grad(loss(plain))(x[0]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(tangent, plain(x[1]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(turned, 2 * _gaussian(2, 12), rtol=1e-5, atol=1e-5)  # T is orthonormal
