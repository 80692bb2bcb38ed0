"""Records as metrics.jsonl has them, of four heads."""


def training_record(step, **values):
    record = {"step": step, "samples": 8 * step, "tokens": 128 * step, "loss": 2.8467}
    for head, count in enumerate((1024, 614, 608, 602)):
        record[f"loss_head_{head}"] = 2.5 + 0.25 * head
        record[f"selected_ratio_head_{head}"] = 0.6 if head else 1.0
        record[f"selected_count_head_{head}"] = count
        record[f"valid_count_head_{head}"] = 1024 - head
    for head, value in ((1, 0.4213), (2, 0.5099), (3, 0.375)):
        record[f"threshold_head_{head}"] = value
        record[f"excess_mean_head_{head}"] = value
    record |= {"selection_ratio": 0.7, "heads_per_position": 2.8, "learning_rate": 1e-3, "grad_norm": 0.5}
    return record | {"tokens_per_second": 12345.6, "skipped_steps": 0} | values


def validation_record(step, losses):
    return {"step": step, "samples": 8 * step, "split": "validation", "loss": 1.0} | {
        f"loss_head_{head}": loss for head, loss in enumerate(losses)
    }
