"""The table of an evaluation."""


def print_accuracy(metrics: dict[str, float]) -> None:
    print(f"{'parameters':<12}{'top-1':>8} {'top-5':>8} {'loss':>8}   on {metrics['eval/num_examples']:.0f} examples")
    for label, prefix in (("raw", "eval"), ("EMA", "eval_ema")):
        top1, top5, loss = (metrics[f"{prefix}/{name}"] for name in ("top1", "top5", "loss"))
        print(f"{label:<12}{top1:>8.2%} {top5:>8.2%} {loss:>8.4f}")
