"""A pretended CUDA device where there is no GPU: real numbers, and CUDA's rules about which tensors may meet.

Import it before torch, in a process of its own. Tensors "on cuda:0" are wrappers around CPU tensors; a dispatch mode unwraps them,
computes on the CPU, wraps again, and raises what a GPU would raise: tensors of two devices in one operation, ``numpy()``, a CPU
generator for a CUDA tensor, integer matrix products, a fused optimiser step over unlike layouts. A few lines of C++ tell
autograd that the device exists. It cannot show wrong kernels, TF32, races or a lack of memory, and it leans on private parts of
PyTorch 2.13 and 2.14.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEVICE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using D = c10::Device; using S = c10::Stream; using N = c10::DeviceIndex;
const D here(c10::DeviceType::CUDA, 0);
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return here.type(); }
  D exchangeDevice(D) const override { return here; }
  D getDevice() const override { return here; }
  void setDevice(D) const override {}
  void uncheckedSetDevice(D) const noexcept override {}
  S getStream(D) const override { return S(S::DEFAULT, here); }
  S exchangeStream(S) const override { return S(S::DEFAULT, here); }
  N deviceCount() const noexcept override { return 1; }
  void record(void**, const S&, const N, const c10::EventFlag) const override {}
  void block(void*, const S&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const N) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(N) const override { return true; }
  N deviceCount() const override { return 1; }
  N getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)
}
"""


def _load_device() -> None:
    """Compile DEVICE against the installed PyTorch and load it before PyTorch looks for a GPU."""
    if "torch" in sys.modules:
        raise ImportError("import pretended before torch: PyTorch looks for a GPU once, when it is imported")
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    key = hashlib.sha256((DEVICE + str(root) + (root / "version.py").read_text()).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"saeutils-pretended-{os.getuid()}-{key}.so"
    if not library.exists():
        source, made = library.with_suffix(f".{os.getpid()}.cpp"), library.with_suffix(f".{os.getpid()}")
        source.write_text(DEVICE)
        call = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
        call += ["-o", str(made), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        subprocess.run(call, check=True)
        source.unlink()
        os.replace(made, library)
    ctypes.CDLL(str(library))


_load_device()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (it reads torch.cuda's functions once: the real ones)
import torch.utils._mode_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

CAPABILITY = (7, 5)  # a T4: no bfloat16
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
SCALARS = INDEXED | {"where", "masked_fill", "masked_fill_", "fill_"}
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "dot"}


class Cuda(torch.Tensor):
    """A tensor that says it is on cuda:0; ``held`` has its numbers, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        dense = held.layout == torch.strided
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()} if dense else {}
        out = torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device="cuda:0", **place)
        out.held = held
        return out

    is_sparse = property(lambda self: self.held.is_sparse)
    layout = property(lambda self: self.held.layout)

    def __tensor_flatten__(self):  # lets Module.to() keep the identity of parameters, as it does for a GPU
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Cuda(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.data.__set__ and isinstance(args[1], Cuda):
            with torch._C.DisableTorchFunctionSubclass():
                func(*args)
            args[0].held = args[1].held.detach()
            return None
        if name in ("numpy", "__array__") and isinstance(args[0], Cuda):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if name == "scaled_dot_product_attention":  # a CUDA build would look for its kernels
            with torch._C.DisableTorchFunctionSubclass():
                return _attention(*args, **(kwargs or {}))
        if name == "untyped_storage":  # safetensors asks which tensors share memory
            return args[0].held.untyped_storage()
        if name in ("tolist", "__format__", "__repr__"):
            return getattr(args[0].held.detach(), name)(*args[1:], **(kwargs or {}))
        if name == "__reduce_ex__":
            return _restored, (args[0].held.detach(), args[0].requires_grad)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _restored(held: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    return Cuda(held).requires_grad_(requires_grad)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    more = {"scale": scale, "enable_gqa": enable_gqa}
    return torch._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, None, **more)[0]


def _refuse(func, message: str) -> None:
    raise RuntimeError(f"{message} (pretended, {func})")


def _check(func, name: str, args, tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would."""
    if name in INDEXED:
        own, indices = args[0], [t for t in args[1] if t is not None]
        if not isinstance(own, Cuda) and any(isinstance(i, Cuda) for i in indices):
            _refuse(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [t for t in (own, *args[2:3]) if isinstance(t, torch.Tensor)]  # indices on the CPU are moved
    on = [t for t in tensors if isinstance(t, Cuda)]
    scalars = name in SCALARS or torch.Tag.pointwise in func.tags
    if on and (off := [tuple(t.shape) for t in tensors if not isinstance(t, Cuda) and (t.dim() or not scalars)]):
        _refuse(func, f"Expected all tensors to be on the same device, but found cuda:0 and cpu, shape {off}")
    if on and name in PRODUCTS and not (on[0].is_floating_point() or on[0].is_complex()):
        _refuse(func, f'"{name}_cuda" not implemented for {on[0].dtype}')
    fused = zip(*args[:4], strict=True) if name in ("_fused_adam_", "_fused_adamw_") else ()
    if any(len({t.stride() for t in group}) > 1 for group in fused):
        _refuse(func, "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


def _run(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return torch.device("cuda:0")
    if kwargs.get("pin_memory"):  # as good as any other memory of the CPU here
        kwargs = {**kwargs, "pin_memory": False}
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    own = {id(t.held): t for t in tensors if isinstance(t, Cuda)}
    device = kwargs.get("device")
    if not own and (device is None or torch.device(device).type != "cuda"):
        return func(*args, **kwargs)
    if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd has taken it apart already
        with _Mode():
            return func.decompose(*args, **kwargs)
    name = func._schema.name.split("::")[1]
    if name == "_fused_sdp_choice":
        return 0  # math: what the CPU would choose is no kernel of CUDA's
    on = torch.device(device).type == "cuda" if device is not None else bool(own)
    if on and getattr(kwargs.get("generator"), "device", torch.device("cuda")).type == "cpu":
        _refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
    moving = name in ("_to_copy", "copy_")
    if moving:
        on = on if name == "_to_copy" else isinstance(args[0], Cuda)
    elif device is None:
        _check(func, name, args, tensors)
    if torch.Tag.inplace_view in func.tags:  # squeeze_ and the like: the wrapper's shape changes too
        with torch.utils._mode_utils.no_dispatch(), _as_meta():
            func(*args, **kwargs)
    args, kwargs = tree_unflatten([t.held if isinstance(t, Cuda) else t for t in flat], spec)
    if device is not None:
        kwargs["device"] = "cpu"
    result = func(*args, **kwargs)
    if name == "_to_copy" and result is args[0]:  # another device: never the same memory
        result = result.clone()
    if not on:
        return result
    return tree_map(lambda r: _wrapped(r, own) if isinstance(r, torch.Tensor) else r, result)


def _wrapped(held: torch.Tensor, own: dict[int, Cuda]) -> Cuda:
    """The wrapper that a result already has (it was changed in place, or ``out=``), or a new one."""
    if (known := own.get(id(held))) is None:
        return Cuda(held)
    if known.shape != held.shape:
        raise NotImplementedError(f"pretended: a result of shape {tuple(held.shape)} for out= of {tuple(known.shape)}")
    return known


@contextlib.contextmanager
def _as_meta():
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        yield
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _nothing(*_, **__) -> None:
    pass


def _load(*args, map_location=None, **kwargs):
    """``torch.load``: tensors go where ``map_location`` says, or where they were when they were saved."""
    found = _torch_load(*args, map_location=None if map_location is None else "cpu", **kwargs)
    move = lambda t: t.to(map_location) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return found if map_location is None else tree_map(move, found)


def _install() -> None:
    torch._C._ensureCUDADeviceGuardSet()  # for a CUDA build without a GPU, whose own guard has replaced ours
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU and moved
    torch._C._set_multithreading_enabled(False)  # backward passes in this thread
    random_state = torch.get_rng_state
    answers = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_capability=CAPABILITY,
        get_device_name="pretended T4", memory_allocated=0, max_memory_allocated=0, mem_get_info=(15 << 30, 15 << 30),
        is_current_stream_capturing=False,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    quiet = "_lazy_init init manual_seed manual_seed_all synchronize empty_cache set_device set_rng_state"
    for name in (*quiet.split(), "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _nothing)
    torch.cuda.get_rng_state = lambda *_: random_state()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    torch.serialization.add_safe_globals([_restored])
    torch.load = _load
    _Mode().__enter__()


_torch_load = torch.load
_install()
