"""PSNR and SSIM as scripts of the LlamaGen lineage take them: the reconstruction truncated to uint8."""

import torch

from vistok.core.fidelity import psnr, ssim


def run(case):
    original, decoded = case.inputs["original"], case.inputs["decoded"]
    levels = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8)
    real, made = (original + 1) / 2, levels.float() / 255
    return {
        "decoded_uint8": levels.permute(0, 2, 3, 1),
        "psnr": psnr(made, real),
        "ssim": ssim(made, real, case.hyper["window"]),
        "ssim_data_range_2": ssim(made, real, case.hyper["window"], data_range=2.0),
    }
