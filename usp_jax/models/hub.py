"""Names on the Hugging Face hub, given where a folder is expected."""

import re


def download_hint(model: str) -> str:
    """Returns how to download a model, or "" if its name is not like a hub's.

    Args:
      model: a path that does not exist.
    """
    match = re.fullmatch(r"\w[\w.-]*/(\w[\w.-]*)", model)
    if match is None or model.endswith(".json"):
        return ""
    return (
        f"; if it is on huggingface.co, download it and give the folder {match[1]}: "
        f"hf download {model} --local-dir {match[1]}"
    )
