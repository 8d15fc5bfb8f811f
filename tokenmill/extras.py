"""Names the extra that installs a missing package, in one line for the user."""

EXTRAS = {  # name of the import: the extra in pyproject.toml that installs it
    **dict.fromkeys(("torch", "safetensors", "scipy", "faiss", "PIL", "matplotlib", "torchmetrics"), "tokenizer"),
    **dict.fromkeys(("ray", "omegaconf", "yaml", "braceexpand", "tensorboardX", "jinja2"), "jobs"),
    **dict.fromkeys(("s3fs", "botocore", "aiobotocore"), "s3"),
    **dict.fromkeys(("gcsfs",), "gcs"),
    **dict.fromkeys(("adlfs",), "azure"),
    **dict.fromkeys(("soundfile", "soxr", "av", "pesq", "pystoi"), "audio"),
    **dict.fromkeys(("lpips", "torchvision"), "lpips"),
    **dict.fromkeys(("transformers", "diffusers", "huggingface_hub"), "hf"),
}


def explain(error: ImportError, user: str) -> ImportError:
    """An error that names the missing package, who needs it and the extra that installs it; error if we know none."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return error
    return ImportError(f"{user} needs the package {package}: pip install 'tokenmill[{EXTRAS[package]}]'", name=package)
