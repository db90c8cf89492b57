"""Where networks run: device, precision, loader processes, and how much fits into memory."""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import torch

from common.data.images import CHANNELS, MAX_SIDE
from common.errors import UserError, first_line
from common.process.parallel import worker_number
from common.recipes import Recipe, stored_size
from common.train.dataset import BATCH
from common.train.distributed import ALONE, Team, join_team, local_rank, local_size

MALLOPT = {-3: 2**26, -1: 2**28}  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in bytes, see `keep_freed_memory`
MEMORY_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PREFETCHED = 2  # batches that each loader process keeps ready, DataLoader's default
SHARED_MEMORY = Path("/dev/shm")  # where loader processes put batches


@dataclass(frozen=True)
class HardwareOptions:
    """The command line's hardware flags; 'auto' and None let the machine decide.

    jobs : trainings that share the machine
    """

    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    micro_batch: int | None = None
    compiled: bool = False
    memory_format: str = "channels-last"
    fast: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Hardware:
    """Where and how a network runs.

    autocast : type of autocast, None for 32-bit floats
    workers : loader processes
    team : the processes that train together
    micro_batch : images of a batch that are in memory at once; None for all
    compiled, memory_format : for training: whether the network is compiled, and the memory layout of its tensors
    fast : choose kernels by speed, so two runs may differ in their last digits
    """

    device: torch.device
    autocast: torch.dtype | None = None
    workers: int = 0
    team: Team = ALONE
    micro_batch: int | None = None
    compiled: bool = False
    memory_format: torch.memory_format = torch.channels_last
    fast: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def casting(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def record(self) -> dict:
        """Return the values for logs and sidecars, as plain types."""
        return {
            "device": device_name(self.device),
            "precision": str(self.autocast or torch.float32).removeprefix("torch."),
            "workers": self.workers,
            "processes": self.team.size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "kernels": "fast" if self.fast else "deterministic",
        }

    def __str__(self) -> str:
        note = self.record()
        cuda = f", CUDA {note['cuda']}" if self.is_gpu else ""
        team = f", {self.team.size} processes" if self.team.size > 1 else ""
        loaders = f"{self.workers or 'no'} loader process{'es' * (self.workers != 1)}"
        return f"{note['device']}, {note['precision']}{team}, {loaders}, torch {note['torch']}{cuda}, {note['kernels']}"


def choose_hardware(
    options: HardwareOptions = HardwareOptions(), training: bool = True, trial: bool = True
) -> Hardware:
    """Resolve 'auto': a GPU if there is one, else the CPU, at its fastest precision.

    That is bfloat16 if the device multiplies it in hardware, float16 on older GPUs, else 32 bit. A CPU always predicts
    in 32 bit, so that no image's result depends on its batch.
    If torchrun or a stage started several processes on one machine, each takes its own GPU. On a CPU the training
    process loads the batches itself by default, to leave the cores to the network.

    trial : run a kernel on the device, and make it the one that this process allocates on
    Raises UserError for a device that does not work.
    """
    device = choose_device(options.device)
    if trial:
        try_device(device)
    keep_freed_memory()
    precision = options.precision
    if precision == "auto" and device.type == "cpu":
        precision = "bf16" if training and bf16_is_faster(*cpu_flags()) else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    workers = options.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else max(1, joblib.cpu_count() // (options.jobs * local_size()))
    return Hardware(
        device,
        PRECISIONS[precision],
        workers,
        join_team(device),
        options.micro_batch,
        options.compiled,
        MEMORY_FORMATS[options.memory_format],
        options.fast,
    )


# --- devices -----------------------------------------------------------------------------------------------


def gpu_count(device: str) -> int:
    """Return how many GPUs the option `device` leaves to choose from."""
    return torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0


def choose_device(name: str) -> torch.device:
    """Return the device of an option: with 'auto' and 'cuda' the GPU of this process among its siblings."""
    if count := gpu_count(name):
        rank = local_rank()
        number = rank if rank is not None else worker_number() or 0
        return torch.device("cuda", number % count)
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise unusable(name, first_line(error)) from None
    if device.type not in ("cpu", "cuda"):
        raise unusable(name, "neither a CPU nor a CUDA GPU")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def try_device(device: torch.device) -> None:
    """Make a GPU this process's default and run a kernel on it; raises UserError if that fails."""
    if device.type != "cuda":
        return
    try:
        if device.index >= torch.cuda.device_count() > 0:
            raise unusable(
                str(device), f"this machine has {', '.join(f'cuda:{k}' for k in range(torch.cuda.device_count()))}"
            )
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read at the first product; without it products vary between runs
        torch.cuda.set_device(device)  # from now on this process seeds and allocates there only
        run_kernel(device)
    except (
        RuntimeError,
        AssertionError,
        torch.cuda.DeferredCudaCallError,
    ) as error:  # AssertionError: a torch without CUDA
        text = first_line(error)
        if "no kernel image" not in text:
            raise unusable(str(device), text) from None
        major, minor = torch.cuda.get_device_capability(device)
        known = ", ".join(torch.cuda.get_arch_list())
        raise UserError(
            f"torch {torch.__version__} has no kernels for {device} ({torch.cuda.get_device_name(device)}, "
            f"sm_{major}{minor}; it has them for {known}); install a torch release for this GPU, or use --device cpu"
        ) from None


def run_kernel(device: torch.device) -> None:
    """Multiply and add on a device: a card that torch does not know has memory, but no kernels."""
    ones = torch.ones(8, 8, device=device)
    (ones @ ones).sum().item()


def unusable(name: str, reason: str) -> UserError:
    return UserError(f"device {name!r} cannot be used ({reason}); try --device cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU ({cpu_flags()[1] or 'unknown'}, {joblib.cpu_count()} cores)"


def idle_gpu() -> str | None:
    """Return why torch cannot use this machine's GPU.

    None if it can, if there is no GPU, or if CUDA_VISIBLE_DEVICES hides it.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not nvidia_driver():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    return str(caught[0].message).splitlines()[0] if caught else "torch finds no usable GPU"


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver; None if there is none."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split("\n")[0].strip()


def cpu_flags() -> tuple[set[str], str]:
    """Return the processor's features and its name, as Linux reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set(), ""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set(values.get("flags", "").split()), values.get("model name", "")


def bf16_is_faster(flags: set[str], name: str) -> bool:
    """Tell whether a CPU multiplies bfloat16 faster than 32 bit: Intel's need AMX, others AMX or AVX-512."""
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "Intel" not in name)


# --- memory ------------------------------------------------------------------------------------------------


@dataclass
class Fitting:
    """How many images a GPU predicted at once when its memory was full; None before that."""

    size: int | None = None


def memory_mib(device: torch.device) -> int:
    """Return the memory of this process in MiB: on a GPU what its tensors took at most, else what is resident now."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return round(resident / 2**20)


def reset_peak_memory(device: torch.device) -> None:
    """Measure a GPU's memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MB of freed memory for the next batch.

    Else it returns the memory to the system after every step, and the system zeroes it again page by page. That takes
    up to a tenth of a small network's step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def set_kernels(hardware: Hardware) -> None:
    """Choose kernels for this process: those that give the same bits in every run, or with `fast` the fastest ones."""
    torch.use_deterministic_algorithms(not hardware.fast, warn_only=True)
    # Nothing here reads uninitialised memory. The property is not in the stubs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = hardware.fast
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = hardware.fast


def batch_bytes(recipe: Recipe, crops: int, whole: int = BATCH) -> int:
    """Return the bytes of the largest batch that is loaded: of `crops` training crops, or of `whole` images."""
    pixels = max(crops * recipe.crop**2, whole * stored_size(recipe.store, MAX_SIDE) ** 2)
    return pixels * len(CHANNELS)


def loaders_that_fit(free: int, batch_bytes: int) -> int:
    """Return how many loader processes have room for their batches in `free` bytes of shared memory."""
    return free // ((PREFETCHED + 1) * batch_bytes)  # one more is being loaded


def fit_shared_memory(hardware: Hardware, options: HardwareOptions, batch_bytes: int) -> Hardware:
    """Return the hardware with as many loader processes as /dev/shm has room for; warn if these are fewer.

    batch_bytes : of the largest batch
    Raises UserError if --workers asks for more processes than fit: torch would hang.
    """
    if not hardware.workers or not SHARED_MEMORY.is_dir():
        return hardware
    free = shutil.disk_usage(SHARED_MEMORY).free
    fits = loaders_that_fit(free // (options.jobs * local_size()), batch_bytes)
    if fits >= hardware.workers:
        return hardware
    found = (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, enough for {fits} loader processes with batches of "
        f"{batch_bytes / 1e6:.0f} MB"
    )
    cure = "make it larger (docker run --shm-size=16g), or use a smaller batch"
    if options.workers is not None:
        raise UserError(f"{found}, not for {hardware.workers}; {cure} or --workers {fits}")
    print(f"warning: {found}; using {fits}. For more, {cure}", file=sys.stderr, flush=True)
    return replace(hardware, workers=fits)


def check_torchrun(args: argparse.Namespace, training: bool) -> None:
    """Refuse flags and stages that do not work with torchrun."""
    if local_rank() is None:
        return
    if not training:
        raise UserError(
            "this stage does not work with torchrun; start it without torchrun, and use --jobs N for N folds at once"
        )
    if args.jobs or args.cluster:
        raise UserError("torchrun's processes train one fold together; leave out --jobs and --cluster, or torchrun")


def plan_hardware(
    args: argparse.Namespace, stage: str, n_jobs: int, training: bool = True
) -> tuple[HardwareOptions, Hardware]:
    """Return the options of a stage's jobs, with how many run at once, and the hardware of one; prints one line.

    args : parsed arguments of stage 04 or 05; n_jobs : how many jobs there are
    Raises UserError for flags that do not work with torchrun.
    """
    names = HardwareOptions.__dataclass_fields__.keys() & vars(args).keys()
    options = HardwareOptions(**{name: getattr(args, name) for name in names if name != "jobs"})
    check_torchrun(args, training)
    gpus = gpu_count(options.device)
    jobs = (
        joblib.cpu_count()
        if args.jobs == -1
        else args.jobs or (1 if local_rank() is not None or args.cluster else gpus or 1)
    )
    options = replace(options, jobs=max(1, min(jobs, n_jobs)))
    alone = options.jobs == 1 and not args.cluster
    hardware = choose_hardware(options, training, trial=alone)  # jobs of other processes try their own GPU
    if not args.cluster:
        used = min(options.jobs, gpus)
        several = f"{options.jobs} jobs at once{f' on {used} GPUs' * (used > 1)}, each on " if options.jobs > 1 else ""
        print(f"{stage}: {several}{hardware}", flush=True)
        if not hardware.is_gpu and options.device == "auto" and (reason := idle_gpu()):
            print(
                f"warning: there is a GPU, but torch cannot use it ({reason}), so the CPU is used; "
                "see --check of 01_preprocess.py",
                file=sys.stderr,
                flush=True,
            )
    return options, hardware
