"""The commands whose folders were made before identities had keys, and those that complete them."""

from __future__ import annotations

CPU = ("trainer.accelerator=cpu", "trainer.devices=1")

TRAIN = (
    "experiment=digits",
    "model.hidden_size=8",
    "model.depth=2",
    "model.num_heads=1",
    "data.batch_size=4",
    "every_n_steps.checkpoint=2",
    "every_n_steps.validation=100",
    "every_n_steps.preview=100",
    "every_n_steps.log=1",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
TRAINED = {
    "hill": (*TRAIN, "name=hill"),
    "line": (*TRAIN, "name=line", "process=flow", "objective=flow"),
}
"""Runs stopped after two steps, by what they are called."""

DRAW = ("steps=3", "batch_size=2", "gallery.num=0", *CPU)
PERTURBED = ("pag_scale=0.5", "seg_scale=0.5", "slg_scale=0.5", "tpg_scale=0.5", "blur_scale=0.5")
DRAWN = {
    "sag_cfg": (*DRAW, "sag_scale=0.5", "cfg_scale=1.5", "gallery.num=1"),
    "perturbed": (*DRAW, *PERTURBED, "tsg_scale=1.5", "icg_scale=1.5", "sag_scale=0"),
    "scheduler": (*DRAW, "sag_scale=0.5", "sampler=dpmpp_2m"),
    "projected": (*DRAW, "apg_scale=1.5", "sampler=ddpm", "guidance.apg.schedule=cosine"),
    "autoguided": (*DRAW, "auto_scale=1.5", "guidance.auto.ckpt={hill}"),
    "flow": (*DRAW, "ckpt={line}", "cfgzero_scale=1.5", "sag_scale=0.5", "sampler=heun_flow"),
    "classified": (
        *DRAW,
        "classifier_scale=0.001",
        "guidance.classifier.classifier={{_target_: brightness.Brightness}}",
    ),
}
"""Folders of two images each; ``{hill}`` and ``{line}`` are the training runs."""

MEASURE = ("ckpt=digits", "steps=2", "num_images=20", "batch_size=10", "gallery.num=1", *CPU)
FOUR = ("fid", "sfid", "is", "precision")
ONE_ROW = (*MEASURE, "cfg_scale=1.5")
SWEPT = ("-m", *MEASURE, "cfg_scale=1,1.5")
FOUR_METRICS = (*ONE_ROW, f"metrics=[{','.join(FOUR)}]")
"""Evaluations: a sweep of two settings, and one row without recall."""

NAMED = {
    "sample": [
        *((f"sampler={name}",) for name in ("ddim", "ddim_strided", "ddpm", "euler", "unipc")),
        *((f"{name}_scale=0.7", "sag_scale=0") for name in ("cfg", "sag", "blur", "apg", "pag")),
        *((f"{name}_scale=0.7", "sag_scale=0") for name in ("seg", "slg", "tpg", "icg", "tsg")),
        ("cfg_scale=2", "guidance.cfg.interval=[0.2,0.8]", "guidance.cfg.schedule=linear"),
        ("cfg_scale=2", "guidance.cfg.interval_in=sigma", "guidance.cfg.interval=[0.1,null]"),
        ("guidance.sag.mask=square", "guidance.sag.blur_in=grid", "guidance.sag.heads=2"),
        ("guidance.sag.layer=[blocks.0,blocks.2]", "guidance.cfg.rescale=0.7", "cfg_scale=2"),
        ("classes=[3,7]", "seed=5", "max_rows=32", "trainer.precision=bf16-mixed"),
        ("ckpt=patches", "sampler=ddpm"),
        ("ckpt={line}", "sampler=euler_flow"),
        ("ckpt={line}", "sampler=sde_flow", "sampler.norm=0.5"),
        (
            *("sag_scale=0", "+guidance.mine._target_=sag_dit.guidance.pag.PAG"),
            *("+guidance.mine.scale=0.3", "+guidance.mine.layers=[0]"),
        ),
    ],
    "train": [
        ("experiment=digits",),
        ("experiment=digits", "objective=min_snr", "trainer=ddp"),
        ("experiment=digits", "objective._target_=sag_dit.training.objective.squared_error.MSE"),
        ("experiment=digits", "process=flow", "objective=flow", "+process.start=1.0"),
        ("experiment=digits", "+trainer.max_time=00:01:00:00", "schedule=warmup"),
        ("experiment=digits_unet", "schedule=cosine"),
        ("experiment=patches",),
        ("experiment=folder", "data.root=photos"),
        ("experiment=finetune", "ckpt=DiT-XL-2", "data.root=photos", "lora.rank=8"),
        ("experiment=imagenet256", "data.root=latents", "trainer=fsdp"),
        ("experiment=sit_imagenet256", "data.root=latents"),
    ],
    "evaluate": [ONE_ROW, (*ONE_ROW, "metrics=[fid]"), (*ONE_ROW, "confidence.repeats=0")],
}
"""Commands whose folders, or records, have names: see names.json."""
