"""Options that several commands share, under Meta's names, and the Llama that they describe."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.parameter_types import Choice, IntegerOr, Number
from fastllama.distributed import environment

if TYPE_CHECKING:
    from fastllama.generation import Llama

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("reference", "fused", "native")
# The keys of quantization.CHOICES, which imports torch. A test compares them.
QUANTIZE_CHOICES = ("int8", "fp8", "int4", "int4-g64", "int4-g32")
SPECULATE_CHOICES = ("lookup", "draft")
MAX_GUESSES = 15  # a copy of that in kernels/guesses.py, which imports torch. A test compares them.
LONGEST_SEQUENCE = 131072
LARGEST_SEED = 2**63 - 1
BUILTIN_NOTICE = "no --ckpt_dir: using the small model in the package, which knows stories and a few hundred facts"

Decorator = Callable[[Any], Any]


@dataclass(frozen=True)
class ModelOptions:
    """The options of `model_options`, by their names."""

    ckpt_dir: str | None
    tokenizer_path: str | None
    device: str | None
    dtype: str | None
    backend: str | None
    quantize: str | None
    seed: int
    max_seq_len: int
    nproc: int
    adapter: tuple[str, ...]
    speculate: str | None
    draft: str | None
    n_guesses: int | str

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> "ModelOptions":
        """Remove these options from a command's keyword arguments -> ModelOptions."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def build(self, max_batch_size: int, quiet: bool = False, **more: Any) -> "Llama":
        """Build the Llama, with `more` arguments. If several processes share it, the result is a Driver."""
        check_nproc(self.nproc, self.device)
        ckpt_dir, tokenizer_path = checkpoint_and_tokenizer(self.ckpt_dir, self.tokenizer_path, quiet)
        arguments: dict[str, Any] = {
            "ckpt_dir": ckpt_dir,
            "tokenizer_path": tokenizer_path,
            "max_seq_len": self.max_seq_len,
            "max_batch_size": max_batch_size,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "backend": self.backend,
            "quantize": self.quantize,
            "adapter": list(self.adapter),
            "speculate": self.speculate,
            "draft": self.draft,
            "n_guesses": self.n_guesses,
            **more,
        }
        from fastllama.generation import Llama

        if self.nproc == 1 and not environment.is_distributed():
            return Llama.build(**arguments)
        from fastllama.distributed import driver

        if self.nproc > 1:
            driver.start_workers(self.nproc)
        return driver.build_on_all(Llama.build, **arguments)


class RunAsWorker(Exception):
    """Raised if a launcher started this process with a rank above 0: it must run as a worker."""


def connect_processes(nproc: int) -> None:
    """Connect the processes of a launch. Every command that builds a model calls this before it reads or prints.

    Raises RunAsWorker in ranks above 0, and ValueError if the launcher's variables are invalid.
    """
    if nproc > 1 and environment.world_size() > 1:
        raise click.UsageError("--nproc starts processes, and WORLD_SIZE is set as by torchrun: use only one of them.")
    launch = environment.distributed_environment()
    if launch is None:
        return
    if launch.rank > 0:
        raise RunAsWorker
    from fastllama.distributed import driver

    driver.connect_workers()


def check_nproc(nproc: int, device: str | None) -> None:
    """Raise UsageError if --device or the number of GPUs contradicts --nproc or torchrun."""
    source = "--nproc" if nproc > 1 else "torchrun" if environment.is_distributed() else None
    if source and device is not None and ":" in device:
        raise click.UsageError(f"{source} puts a process on each GPU: use --device cuda, not {device}.")
    if nproc > 1:
        import torch

        from fastllama.loading import choose_device

        n_gpus = torch.cuda.device_count()
        if choose_device(device).type == "cuda" and nproc > n_gpus:
            raise click.UsageError(f"--nproc {nproc} puts a process on each GPU, and there are {n_gpus} here.")


def checkpoint_and_tokenizer(ckpt_dir: str | None, tokenizer_path: str | None, quiet: bool) -> tuple[str, str]:
    """The (ckpt_dir, tokenizer_path) to use. Writes a notice to stderr for the built-in model, unless `quiet`."""
    if ckpt_dir is not None:
        # In a folder, the tokenizer finds its file itself. A GGUF file has its own.
        return ckpt_dir, tokenizer_path or ckpt_dir
    if tokenizer_path is not None:
        raise click.UsageError("--tokenizer_path needs --ckpt_dir: the built-in model has its own tokenizer.")
    from fastllama import builtin_checkpoint

    if not quiet:
        standard_streams.write_stderr(BUILTIN_NOTICE)
    ckpt_dir, tokenizer_path = builtin_checkpoint()
    return ckpt_dir, tokenizer_path


def model_options(max_seq_len: int) -> Decorator:
    """The options that ModelOptions holds, and --threads. `max_seq_len` is the default of --max_seq_len."""
    return _combined(
        checkpoint_options,
        adapter_option,
        click.option(
            "--max_seq_len",
            type=click.IntRange(1, LONGEST_SEQUENCE),
            default=max_seq_len,
            show_default=True,
            help="Tokens of prompt and answer together that fit.",
        ),
        device_options,
        quantize_option,
        speculation_options,
        nproc_option,
        threads_option,
        click.option(
            "--seed", type=click.IntRange(0, LARGEST_SEED), default=1, show_default=True, help="Of the random draws."
        ),
    )


def cache_tokens_option(command: Any) -> Any:
    """--cache_tokens."""
    return click.option(
        "--cache_tokens",
        type=click.IntRange(min=1),
        help="Tokens in the cache, of all rows together. Default: --max_seq_len for each row.",
    )(command)


def nproc_option(command: Any) -> Any:
    """--nproc."""
    return click.option(
        "--nproc",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Processes that share the model, one on each GPU.",
    )(command)


def threads_option(command: Any) -> Any:
    """--threads, in effect while the command runs."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        expose_value=False,
        callback=_use_threads,
        help="CPU threads, of all processes. Default: of those that may run here, as many as the work is worth.",
    )(command)


def _use_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    if value is None or context.resilient_parsing:
        return
    if environment.is_distributed():
        raise click.UsageError("--threads does not apply to torchrun's processes: set OMP_NUM_THREADS.")
    from fastllama import threads

    context.with_resource(threads.use_exactly(value))


def checkpoint_options(command: Any) -> Any:
    """--ckpt_dir and --tokenizer_path."""
    return _combined(
        click.option(
            "--ckpt_dir",
            metavar="PATH",
            help="Checkpoint folder, Meta's or Hugging Face's, or a GGUF file. Default: the built-in model.",
        ),
        click.option("--tokenizer_path", metavar="FILE", help="Default: the tokenizer in the checkpoint."),
    )(command)


def adapter_option(command: Any) -> Any:
    """--adapter, any number of times."""
    return click.option(
        "--adapter",
        multiple=True,
        metavar="DIR",
        help="Folder of a LoRA adapter to merge into the weights. May be repeated; merged in this order.",
    )(command)


def device_options(command: Any) -> Any:
    """--device, --dtype and --backend."""
    return _combined(
        click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: cuda where there is one."),
        click.option("--dtype", type=Choice(DTYPES), help="Default: bfloat16 on a GPU, float32 on a CPU."),
        click.option("--backend", type=Choice(BACKENDS), help="Default: what the device asks for."),
    )(command)


def quantize_option(command: Any) -> Any:
    """--quantize."""
    return click.option(
        "--quantize",
        type=Choice(QUANTIZE_CHOICES),
        help="Keep the weights in fewer bits, rounded while they are read. int4 has groups of 128, 64 or 32 columns.",
    )(command)


def speculation_options(command: Any) -> Any:
    """--speculate, --draft and --n_guesses."""
    return _combined(
        click.option(
            "--speculate",
            type=Choice(SPECULATE_CHOICES),
            help="Several tokens a step, for the same answers: guess what followed earlier (lookup), or with --draft.",
        ),
        click.option("--draft", metavar="PATH", help="Checkpoint of a smaller model with the same vocabulary."),
        click.option(
            "--n_guesses",
            type=IntegerOr("auto", 1, MAX_GUESSES),
            default="auto",
            show_default=True,
            help=f"Guesses that a step checks, 1 to {MAX_GUESSES}; auto follows how many were right.",
        ),
    )(command)


def sampling_options(command: Any) -> Any:
    """--temperature, --top_p and --max_gen_len, with the defaults of Meta's code."""
    return _combined(
        click.option(
            "--temperature", type=Number(), default=0.6, show_default=True, help="0 takes the likeliest token."
        ),
        click.option("--top_p", type=Number(), default=0.9, show_default=True, help="Probability mass to draw from."),
        click.option("--max_gen_len", type=click.IntRange(min=0), help="Tokens at most. Default: what fits."),
    )(command)


def json_option(what: str) -> Decorator:
    """--json, which prints `what`."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what}.")


def _combined(*decorators: Decorator) -> Decorator:
    def decorate(command: Any) -> Any:
        # In the order of written decorators, which Python applies from the last to the first.
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate
