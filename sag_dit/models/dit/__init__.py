"""DiT and SiT: diffusion transformers with adaLN-Zero."""
