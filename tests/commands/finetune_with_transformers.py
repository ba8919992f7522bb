"""Fine-tunes an exported folder with transformers' own Trainer; nothing of this project is imported.

python finetune_with_transformers.py EXPORTED DATA OUTPUT prints the loss before and after.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

EXPORTED, DATA, OUTPUT = (Path(argument) for argument in sys.argv[1:])


def examples(processor: Any) -> list[dict[str, Any]]:
    document = json.loads((DATA / "train.json").read_text())
    labels = {category["id"]: label for label, category in enumerate(document["categories"])}
    found = []
    for image in document["images"]:
        objects = [
            {**a, "category_id": labels[a["category_id"]]}
            for a in document["annotations"]
            if a["image_id"] == image["id"]
        ]
        picture = Image.open(DATA / "train" / image["file_name"]).convert("RGB")
        target = {"image_id": image["id"], "annotations": objects}
        batch = processor(images=picture, annotations=target, return_tensors="pt")
        found.append({"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0]})
    return found


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [dict(item["labels"]) for item in items],
    }


def mean_loss(model: Any, items: list[dict[str, Any]]) -> float:
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(float(model(**collate([item])).loss) for item in items) / len(items)


def main() -> None:
    model = AutoModelForObjectDetection.from_pretrained(EXPORTED)
    items = examples(AutoImageProcessor.from_pretrained(EXPORTED))
    before = mean_loss(model, items)
    arguments = TrainingArguments(
        output_dir=str(OUTPUT),
        max_steps=60,
        per_device_train_batch_size=1,  # images of one size need no padding
        learning_rate=5e-4,
        max_grad_norm=0.1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=items, data_collator=collate).train()
    assert not [name for name in sys.modules if name.startswith("aligndet")]
    print(before, mean_loss(model, items))


if __name__ == "__main__":
    main()
