"""What a folder or file is that holds no checkpoint but looks as if it did, and what to do with it."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from fastllama.checkpoint.json_config import JsonConfig, listing, shown
from fastllama.checkpoint.weight_files import TRAINING_STATE

ADAPTER_CONFIG_NAME = "adapter_config.json"
PICKLED_ADAPTERS = ("adapter_model.bin",)
ADAPTER_NAMES = ("adapter_model.safetensors", "adapters.safetensors", *PICKLED_ADAPTERS)
FOLDERS_SEARCHED = 200

SAVE_AS_SAFETENSORS = "load it with transformers and save_pretrained it, which writes safetensors"
# What weights of other programs are called, and what they are.
OTHER_FORMATS = {
    "*.gguf": "a GGUF file of llama.cpp; fastllama reads the original weights, safetensors or .pth: download those",
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
    "*.pt": "weights that no one calls a checkpoint's; call Meta's consolidated.00.pth, or save safetensors",
    "*.npz": "weights of MLX or numpy; fastllama reads safetensors or .pth",
}
# Those that are a folder's own model, in whose stead original/ must not answer. The others may be any stray file.
OWN_WEIGHTS = (
    "pytorch_model*.bin*",
    "model-*.bin*",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "*.distcp",
    "global_step*",
)


def describe_file(path: Path) -> str:
    """What to do where a file stands in the place of a folder."""
    for pattern, what in OTHER_FORMATS.items():
        if path.match(pattern):
            return f"is {what}"
    return "is a file; pass the folder it is in"


def describe_folder(folder: Path, patterns: Collection[str] = tuple(OTHER_FORMATS)) -> str | None:
    """What the weights in a folder are that is known not to hold a checkpoint; None where there are none.

    Reads names, and of an adapter its configuration. `patterns` are those of OTHER_FORMATS to look for.
    """
    if any((folder / name).exists() for name in (ADAPTER_CONFIG_NAME, *ADAPTER_NAMES)):
        return _describe_adapter(folder)
    for pattern in patterns:
        if found := _others_called(folder, pattern):
            return f"{listing([found[0].name])} is {OTHER_FORMATS[pattern]}"
    return None


def stray_files(folder: Path) -> list[Path]:
    """Files in other formats that need not be the folder's own weights, such as prompts.pt."""
    patterns = [pattern for pattern in OTHER_FORMATS if pattern not in OWN_WEIGHTS]
    return sorted(path for pattern in patterns for path in _others_called(folder, pattern))


def _others_called(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not TRAINING_STATE.fullmatch(path.stem))


def _describe_adapter(folder: Path) -> str:
    kind, base = "an adapter (LoRA or its like)", "its base model"
    try:
        config = JsonConfig.read(folder / ADAPTER_CONFIG_NAME)
    except ValueError:  # absent or broken: it stays an adapter
        config = JsonConfig(folder, {})
    if isinstance(name := config.values.get("base_model_name_or_path"), str) and name:
        base = f"its base model {shown(name)}"
    if isinstance(peft_type := config.values.get("peft_type"), str):
        kind = "a LoRA adapter" if peft_type == "LORA" else f"an adapter ({shown(peft_type)})"
    return (
        f"it holds {kind}, not a whole model: merge it into {base} first, with PEFT's merge_and_unload() and then "
        "save_pretrained(), and pass the folder that makes"
    )


def find_below(folder: Path, holds_checkpoint: Callable[[Path], bool]) -> list[Path]:
    """The folders right below that hold a checkpoint, and those of Hugging Face's cache (snapshots/<revision>)."""
    try:
        entries = [entry for pattern in ("*", "snapshots/*", "*/snapshots/*") for entry in sorted(folder.glob(pattern))]
        return [entry for entry in entries[:FOLDERS_SEARCHED] if os.path.isdir(entry) and holds_checkpoint(entry)]
    except OSError:  # not ours to read
        return []
