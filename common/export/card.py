"""The model card: README.md of a package, from what was measured."""

from common.errors import command

FEW = 10  # positives: fewer say little about a class
GOOD, WEAK = 0.8, 0.5  # F1
LISTED = 8  # classes in a sentence


def write_card(description: dict) -> str:
    """Return the text of a package's README.md from the content of its model.json."""
    parts = (summary, use, training, validation, limits, licence, provenance)
    return "\n\n".join(part(description) for part in parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(description: dict) -> str:
    members = description["members"]
    runs: dict[str, list[dict]] = {}
    for row in members:
        runs.setdefault(row["name"], []).append(row)
    lines = [
        f"- `{name}`: {rows[0]['recipe']['encoder']}, folds {', '.join(str(row['fold']) for row in rows)}, weight "
        f"{sum(row['weight'] for row in rows):.2f}"
        for name, rows in runs.items()
    ]
    channels = "\n".join(
        f"{number}. {row['name']}: {row['meaning']}" for number, row in enumerate(description["channels"], start=1)
    )
    return (
        f"# {description['name']}\n\n"
        "This model predicts in which of 28 cell structures a protein is, from fluorescence images of fields of cells "
        "with four channels. Several structures at once are possible.\n\n"
        f"Channels, in this order:\n\n{channels}\n\n"
        f"Networks, whose probabilities are averaged:\n\n" + "\n".join(lines)
    )


def use(description: dict) -> str:
    sides = ", ".join(
        f"{row['side']} px a side" + (f" ({row['rule']})" if row["rule"] != "fixed" else "")
        for row in description["images"]
    )
    text = (
        "## How to use it\n\n"
        "With the project that made it:\n\n"
        f"```bash\n{command('10_predict.py', '--images', 'FOLDER', '--model', 'PACKAGE', '--out', 'ANSWERS')}\n```\n\n"
        f"Networks see a field at {sides}. The training images have {description['pixel_size']:g} micrometres per pixel "
        f"at {description['pixel_size_at_side']} px a side: images of another magnification must be scaled to that. "
        "Values are 8 bit, from 0 to 255. `model.json` has everything else: classes, thresholds, calibration, "
        "normalisation and the settings of each network; `weights/` has the tensors as safetensors. A class is "
        "predicted if its probability reaches its threshold"
        + (
            "; if none does, the most probable class is predicted."
            if (description["decision"] or {}).get("fallback", "argmax") == "argmax"
            else "."
        )
    )
    return text + "".join(graph_use(graph, len(description["onnx"])) for graph in description["onnx"])


def graph_use(graph: dict, n_graphs: int) -> str:
    share = "" if n_graphs == 1 else f" Its share in the model's mean is {graph['share']:.3f}."
    return (
        f"\n\n`{graph['file']}` is an ONNX graph: `images` (n, 4, height, width) float32, 0 to 255, become "
        f"`probabilities` (n, 28). Give it whole fields of {graph['side']} px. Normalisation, test-time views and the "
        f"mean over {len(graph['members'])} networks are inside.{share} onnxruntime and torch differ by at most "
        f"{graph['largest_difference']:.1g} on test images.\n\n"
        "```python\n"
        "import onnxruntime\n"
        f"session = onnxruntime.InferenceSession('{graph['file']}')\n"
        "probabilities = session.run(None, {'images': images})[0]\n"
        "```"
    )


def training(description: dict) -> str:
    found = description["training"]
    if "samples" not in found:
        return "## Training data\n\nThe package does not say how many samples the networks were trained on."
    external = found["external_samples"]
    return (
        "## Training data\n\n"
        f"{found['samples']} labelled samples"
        + (f", {external} of them from an additional external set" if external else "")
        + ". Each network left out the samples of its own fold; the scores below are of those. "
        + (
            f"{found['held_out_samples']} further samples were held out of everything. "
            if found["held_out_samples"]
            else ""
        )
        + "The project does not know where the samples come from: ask whoever trained the model. Digest of tables and "
        f"images: `{found['digest'][:16]}`."
        + (
            " `reference/` has Ids, labels and embeddings of up to 256 of the samples of each fold."
            if any(row["reference"] for row in description["members"])
            else ""
        )
    )


def validation(description: dict) -> str:
    found = description["decision"] or {}
    if "per_class" not in found or "interval" not in found:
        return (
            "## Validation\n\nThis package has no scores: the networks were not scored together by stage 06. Treat its "
            "predictions as untested."
        )
    low, high = found["interval"]
    rows = [
        [row["class"], str(row["positives"]), f"{row['f1_cross_fitted']:.3f}", f"{row['threshold']:.3g}"]
        for row in found["per_class"]
    ]
    held_out = ""
    if "score_held_out" in found:
        held_out = f" On {found['n_held_out']} samples that were held out of everything: {found['score_held_out']:.3f}."
    return (
        "## Validation\n\n"
        f"Macro F1 over 28 classes **{found['score_cross_fitted']:.3f}** (95 % bootstrap interval {low:.3f} to "
        f"{high:.3f}) on {found['n_samples']} samples, each predicted by networks that did not train on it, with "
        f"thresholds found on other samples.{held_out}\n\n"
        f"{strengths(found['per_class'])}\n\n"
        + table(["class", "positives", "F1", "threshold"], rows)
        + "\n\nThe best epoch of each network was chosen on the same samples, so the scores flatter a little."
    )


def strengths(per_class: list[dict]) -> str:
    """Return sentences on the classes that the model is good at, weak at, and was hardly tested on."""
    tested = [row for row in per_class if row["positives"] >= FEW]
    kinds = {
        f"Good at (F1 of {GOOD} or more)": [row for row in tested if row["f1_cross_fitted"] >= GOOD],
        f"Weak at (F1 below {WEAK})": [row for row in tested if row["f1_cross_fitted"] < WEAK],
        f"Hardly tested (fewer than {FEW} positives)": [row for row in per_class if 0 < row["positives"] < FEW],
        "Not tested at all (no positives)": [row for row in per_class if not row["positives"]],
    }
    lines = []
    for kind, rows in kinds.items():
        names = ", ".join(row["class"] for row in rows[:LISTED])
        more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        lines.append(f"- {kind}: {names + more or 'none'}.")
    return "\n".join(lines)


def limits(description: dict) -> str:
    return (
        "## Limits\n\n"
        "- Labels are of whole fields of cells, not of single cells.\n"
        "- Other microscopes, stainings, cell lines and magnifications than those of the training data were not tested.\n"
        "- Without one of the four channels, probabilities are guesses.\n"
        "- Rare classes have few positives, so their thresholds and scores are uncertain.\n"
        "- Not for diagnosis or any decision about patients."
    )


def licence(description: dict) -> str:
    stated = description["licence"]
    text = (
        f"The weights are under the licence `{stated}` (SPDX)."
        if stated
        else "No licence is stated, so you may not assume any right to use or pass on the weights: ask whoever made them."
    )
    return f"## Licence\n\n{text} The images that the networks were trained on have terms of their own."


def provenance(description: dict) -> str:
    made = ", ".join(f"{name} {version}" for name, version in description["made_with"].items())
    return (
        "## Provenance\n\n"
        f"Trained by {', '.join(description['authors']) or 'persons who are not named (--author)'}. Format version {description['format_version']}; project's commit `{description['code_version']}`; {made}; "
        f"digest of the model `{description['model_digest'][:16]}`. `model.json` has the SHA-256 of every file. The method "
        "is that of Zhang et al., Multi-labelled proteins recognition for high-throughput microscopy images using deep "
        "convolutional neural networks, BMC Bioinformatics 22 (Suppl 3), 2021."
    )
