"""Where and when quantization hurts: the error of eps at every step of the full-precision trajectory."""
import torch


@torch.no_grad()
def step_sqnr(record, quantized_eps):
    """record: [(step, t, x, eps)] of a full-precision run -> [{"step", "t", "sqnr_db"}].

    SQNR = 10 log10(sum eps^2 / sum (eps_q - eps)^2) over all images, both networks fed the same x.
    """
    rows = []
    for step, t, x, eps in record:
        error = quantized_eps(x, torch.full((len(x),), float(t), device=x.device)) - eps
        ratio = eps.double().square().sum() / error.double().square().sum().clamp(min=1e-30)
        rows.append({"step": step, "t": t, "sqnr_db": float(10 * ratio.log10())})
    return rows
