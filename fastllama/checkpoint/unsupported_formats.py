"""Describes weights in formats that fastllama does not read, and says what to do with them."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from fastllama.checkpoint.json_config import JsonConfig, short_list, short_repr
from fastllama.checkpoint.weight_files import TRAINING_STATE

ADAPTER_CONFIG_NAME = "adapter_config.json"
PICKLED_ADAPTERS = ("adapter_model.bin",)
ADAPTER_NAMES = ("adapter_model.safetensors", "adapters.safetensors", *PICKLED_ADAPTERS)
MAX_FOLDERS_SEARCHED = 200
MERGE_WITH_PEFT = (
    "merge it into its base model with PEFT's merge_and_unload() and then save_pretrained(), and pass the folder that "
    "this writes"
)

SAVE_AS_SAFETENSORS = "load it with transformers and save_pretrained it, which writes safetensors"
# File names of other programs' weights, and the rest of a message that starts with "NAME is".
OTHER_FORMATS = {
    "*.gguf": "a GGUF file; pass the file itself as the checkpoint to use it",
    "pytorch_model*.bin*": "pickled weights; convert pytorch_model*.bin to safetensors first: transformers' "
    "save_pretrained writes them",
    "*.distcp": "a distributed checkpoint of torch; gather it first (torch.distributed.checkpoint.format_utils)",
    "global_step*": "a checkpoint of DeepSpeed; gather it first with its zero_to_fp32.py",
    "model-*.bin*": f"pickled weights; {SAVE_AS_SAFETENSORS}",
    "*.onnx": "an ONNX export; fastllama reads the original weights: download those",
    "tf_model*.h5": f"TensorFlow's weights; {SAVE_AS_SAFETENSORS}",
    "flax_model*.msgpack": f"Flax's weights; {SAVE_AS_SAFETENSORS}",
    "*.nemo": "an archive of NeMo; convert it to Hugging Face's layout with NeMo",
    "*.ckpt": "a checkpoint of a training program; export the model from it as safetensors",
    "*.pt": "a torch file, but not a known kind of checkpoint; call Meta's weights consolidated.00.pth, or save "
    "safetensors",
    "*.npz": "weights of MLX or numpy; fastllama reads safetensors or .pth",
}
# Patterns of a folder's own model: original/ is not used in its place. Files of the other patterns may be unrelated.
OWN_MODEL_PATTERNS = (
    "pytorch_model*.bin*",
    "model-*.bin*",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "*.distcp",
    "global_step*",
)


def describe_file(path: Path) -> str:
    """The end of an error message about a file given instead of a folder: what it is and what to do."""
    for pattern, what in OTHER_FORMATS.items():
        if path.match(pattern):
            return f"is {what}"
    return "is a file; pass the folder it is in"


def describe_folder(folder: Path, patterns: Collection[str] = tuple(OTHER_FORMATS)) -> str | None:
    """What the weights of other formats in a folder are, and what to do with them; None if there are none.

    Reads only names, and the configuration of an adapter. `patterns` are the keys of OTHER_FORMATS to look for.
    """
    if holds_adapter(folder):
        return _describe_adapter(folder)
    for pattern in patterns:
        if matches := _weights_matching(folder, pattern):
            return f"{short_list([matches[0].name])} is {OTHER_FORMATS[pattern]}"
    return None


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of another model, such as LoRA's."""
    return any((folder / name).exists() for name in (ADAPTER_CONFIG_NAME, *ADAPTER_NAMES))


def stray_files(folder: Path) -> list[Path]:
    """Files in other formats that need not be the folder's own model, such as prompts.pt."""
    patterns = [pattern for pattern in OTHER_FORMATS if pattern not in OWN_MODEL_PATTERNS]
    return sorted(path for pattern in patterns for path in _weights_matching(folder, pattern))


def _weights_matching(folder: Path, pattern: str) -> list[Path]:
    """The files that match the pattern, without training state."""
    return sorted(path for path in folder.glob(pattern) if not TRAINING_STATE.fullmatch(path.stem))


def _describe_adapter(folder: Path) -> str:
    kind, base = "an adapter (LoRA or similar)", "its base model"
    try:
        config = JsonConfig.read(folder / ADAPTER_CONFIG_NAME)
    except ValueError:  # absent or broken: it is still an adapter
        config = JsonConfig(folder, {})
    if isinstance(name := config.values.get("base_model_name_or_path"), str) and name:
        base = f"its base model {short_repr(name)}"
    if isinstance(peft_type := config.values.get("peft_type"), str):
        if peft_type != "LORA":
            return f"it holds an adapter ({short_repr(peft_type)}) of {base}, not a complete model: {MERGE_WITH_PEFT}"
        kind = "a LoRA adapter"
    return (
        f"it holds {kind}, not a complete model: pass the folder of {base} as the checkpoint, and this one as adapter= "
        "(on the command line --adapter)"
    )


def find_checkpoint_folders(folder: Path, holds_checkpoint: Callable[[Path], bool]) -> list[Path]:
    """The direct subfolders that hold a checkpoint, and those of a Hugging Face cache (snapshots/<revision>)."""
    try:
        entries = [entry for pattern in ("*", "snapshots/*", "*/snapshots/*") for entry in sorted(folder.glob(pattern))]
        return [entry for entry in entries[:MAX_FOLDERS_SEARCHED] if os.path.isdir(entry) and holds_checkpoint(entry)]
    except OSError:  # no permission to read
        return []
