"""Train the demo model: first the VAE, then the transformer with its text encoders.

    python tools/train_demo.py --work DIR [--vae-steps N] [--steps N] [--export FOLDER]

DIR keeps everything between sittings: log.jsonl, vae-state.pt, vae.pt, state-*.pt; a later call goes on from there. Each kind of
random number has its own seed. On a CPU it runs too, for a test with `--tiny`.
"""

import argparse
import json
import pathlib
import sys
import time

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "demo")]
import configs  # noqa: E402
import export  # noqa: E402
import scoring  # noqa: E402
import transformer_training  # noqa: E402
import vae_training  # noqa: E402
import vocabulary  # noqa: E402
from reference.vae import Vae  # noqa: E402

PARTS = {"state-model.pt": ["done", "steps", "model"], "state-ema.pt": ["ema"], "state-moments.pt": ["first", "second"]}


def save(value, path):
    """Write a file so that a reader never sees half of it."""
    torch.save(value, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


class Training:
    def __init__(self, args):
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.began = time.time()
        if self.device == "cuda":
            vae_training.use_fast_norm()
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64

    def log(self, line):
        entry = {"at": round(time.time() - self.began, 1), **(json.loads(line) if isinstance(line, str) else line)}
        print(json.dumps(entry), flush=True)
        with open(self.work / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def vae(self):
        """The trained and whitened VAE, rounded to bf16 as it will be stored."""
        path, args = self.work / "vae.pt", self.args
        vae = Vae(configs.vae()).to(self.device).eval()
        if path.exists():
            vae.load_state_dict(torch.load(path, weights_only=True))
            return vae
        trainer = vae_training.Trainer(self.device, args.seed, clips=args.vae_clips)
        self.log({"vae_pool": len(trainer.pool.pixels)})
        batches = [(2, 9, 64), (1, 17, 64)] if args.tiny and self.device == "cpu" else vae_training.BATCHES
        unfinished = self.work / "vae-state.pt"
        if unfinished.exists():
            trainer.restore(torch.load(unfinished, weights_only=True))
        trainer.run(args.vae_steps, batches, self.log, args.vae_seconds, save=lambda state: save(state, unfinished))
        vae = trainer.averaged()
        self.log({"whitening": vae_training.fold_whitening(vae, self.device, 8 if args.tiny else 256,
                                                            frames=17 if args.tiny else 49)})
        vae.load_state_dict({k: v.bfloat16().float() for k, v in vae.state_dict().items()})
        self.log({"reconstruction": vae_training.reconstruction(vae, self.device, 4 if args.tiny else 64,
                                                                frames=9 if args.tiny else 49)})
        save({k: v.cpu() for k, v in vae.state_dict().items()}, path)
        unfinished.unlink(missing_ok=True)
        return vae

    def judge_check(self, vae):
        """The quick judge on rendered clips, before and after the VAE."""
        clips = vae_training.data.draw_clips(1 if self.args.tiny else 96, 11, pairs=0.0, held_out="only")
        truth = [(c.objects[0].shape, c.objects[0].colour, c.motion) for c in clips]
        pixels = vae_training.data.render(clips, 17 if self.args.tiny else 49, self.device)[0]
        rebuilt = torch.cat([scoring.frames_of(vae, transformer_training.to_model(
            vae_training.latent_moments(vae, pixels[i:i + 8])[0])) for i in range(0, len(pixels), 8)])
        for name, frames in (("rendered", pixels), ("rebuilt", rebuilt)):
            seen = [scoring.judge(f) for f in frames]
            shares = [round(sum(s[i] == t[i] for s, t in zip(seen, truth)) / len(truth), 3) for i in range(3)]
            self.log({"judge": name, "shape": shares[0], "colour": shares[1], "motion": shares[2]})

    def transformer(self, vae):
        args, tiny = self.args, self.args.tiny
        sizes = vocabulary.write_all(self.work / "tokens")
        tokens = transformer_training.Tokens(self.work / "tokens")
        pool = transformer_training.Pool(vae, tokens, args.pool, args.seed + 2, self.device)
        z = pool.latents[:2000].float()
        self.log({"latent_pool": pool.count, "first_std": round(z[:, :, 0].std().item(), 3),
                  "later_std": round(z[:, :, 1:].std().item(), 3),
                  "first_mean": round(z[:, :, 0].mean().item(), 3), "later_mean": round(z[:, :, 1:].mean().item(), 3)})
        trainer = transformer_training.Trainer(pool, sizes, self.device, args.batch, args.peak, args.seed)
        if all((self.work / name).exists() for name in PARTS):
            state = {}
            for name in PARTS:
                state.update(torch.load(self.work / name, weights_only=True))
            trainer.restore(state)
            args.steps = state["steps"]
            self.log({"resumed_at": trainer.done})
        if args.seconds and self.device == "cuda":
            each = trainer.measure(self.log)
            args.steps = trainer.done + int((args.seconds - (time.time() - self.began)) / each)
            self.log({"steps": args.steps, "step_ms": round(1000 * each, 2)})
        for i in range(1, args.parts + 1):
            until = args.steps * i // args.parts
            if until <= trainer.done:
                continue
            trainer.run(until, args.steps, self.log, every=max(1, args.steps // 60))
            state = {"steps": args.steps, **trainer.state()}
            for name, keys in PARTS.items():
                save({k: state[k] for k in keys}, self.work / name)
            model = trainer.averaged()
            shares, _, _ = scoring.score(model, vae, tokens, self.device, repeats=2, frames=2 if tiny else 6,
                                         steps=1 if tiny else 8, limit=2 if tiny else None)
            self.log({"step": trainer.done, "text_to_video": shares})
        model = trainer.averaged()
        if args.export:
            export.export(args.export, vae, model)
        self.final_scores(model, vae, tokens)

    def warm_compiler(self):
        """Compile the step on random latents, so that a process after this one finds the kernels in the cache."""
        sizes = vocabulary.write_all(self.work / "tokens-warm")
        pool = transformer_training.RandomPool(256, self.device)
        trainer = transformer_training.Trainer(pool, sizes, self.device, self.args.batch)
        self.log({"compiled_step_ms": round(1000 * trainer.measure(self.log), 2)})

    def final_scores(self, model, vae, tokens):
        tiny = self.args.tiny
        for guidance, images in ((2.0, (False, True)), (3.0, (False,))):
            for image in images:
                shares, made, seen = scoring.score(
                    model, vae, tokens, self.device, repeats=3, frames=2 if tiny else 7, steps=1 if tiny else 10,
                    guidance=guidance, seed=21, image=image, limit=2 if tiny else None)
                self.log({"guidance": guidance, "image_to_video": image, "scores": shares, "clips": len(seen)})
                if guidance == 2.0:
                    name = "sheet-i2v.pt" if image else "sheet-t2v.pt"
                    save({"frames": made[:24, ::8].cpu(), "seen": [list(map(str, s)) for s in seen[:24]]}, self.work / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=14000)
    parser.add_argument("--vae-clips", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=60000)
    parser.add_argument("--parts", type=int, default=6, help="savings and scorings along the way")
    parser.add_argument("--pool", type=int, default=32000, help="clips to train the transformer on")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--vae-seconds", type=float, help="as many VAE steps as fit into this time, instead")
    parser.add_argument("--seconds", type=float, help="as many transformer steps as fit before this time since the start")
    parser.add_argument("--warm-compiler", action="store_true", help="only compile the transformer's step, for a cache")
    parser.add_argument("--tiny", action="store_true", help="exercise everything, train nothing useful")
    training = Training(parser.parse_args())
    if training.args.warm_compiler:
        training.warm_compiler()
        return
    vae = training.vae()
    training.judge_check(vae)
    training.transformer(vae)


if __name__ == "__main__":
    main()
