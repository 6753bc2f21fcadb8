//! Longer videos and decoding from what was saved.

use std::fs;

use crate::harness::{Bench, Generate, Run};

fn on(bench: &Bench, command: &str, state: &str, more: &[&str]) -> Run {
    let mut args = vec![command, state, "--store", "store"];
    args.extend(more);
    bench.run(args)
}

#[test]
fn a_clip_becomes_the_longer_one_bit_for_bit() {
    let bench = Bench::new();
    let ask = Generate::new().set("--guidance", "6.3").set("--video-guidance", "3.7");
    bench.generate(&ask.clone().set("-o", "long.mp4").set("--units", "4")).ok();
    bench.generate(&ask.clone().flag("--keep-units").set("--save-latents", "short.st")).ok();
    let long = bench.read("long.mp4");
    // The folder, and the video beside which it is, are one state.
    let run = on(&bench, "extend", "out.mp4", &["--seconds", "1", "-o", "a.mp4"]).ok();
    run.check(run.stderr.contains("2 of 4 latent frames are there"), "what is there");
    assert!(bench.read("a.mp4") == long);
    assert!(bench.path("out.mp4.units/unit-0003.safetensors").exists(), "the state grows");
    on(&bench, "extend", "out.mp4.units", &["--units", "4", "-o", "b.mp4"]).ok();
    assert!(bench.read("b.mp4") == long);
    // And from a file of latents, whose new units stay nowhere.
    on(&bench, "extend", "short.st", &["--model"]).fails(2, &["--model"]);
    let model = crate::harness::golden("sd3");
    let model = model.to_str().expect("UTF-8");
    let more = ["--frames", "25", "-o", "c.mp4", "--model", model, "--save-latents", "long.st"];
    on(&bench, "extend", "short.st", &more).ok();
    assert!(bench.read("c.mp4") == long);
    assert!(!bench.path("c.mp4.units").exists());
    on(&bench, "decode", "long.st", &["--model", model, "-o", "d.mp4"]).ok();
    assert!(bench.read("d.mp4") == long);
    // Without a length, up to what was asked for last; nothing is replaced unasked.
    on(&bench, "extend", "out.mp4", &[]).fails(2, &["out.mp4 exists already"]);
    on(&bench, "extend", "out.mp4", &["-y"]).ok();
    assert!(bench.read("out.mp4") == long);
    on(&bench, "extend", "out.mp4", &["-y", "--units", "2"])
        .fails(3, &["4 latent frames are there"]);
}

#[test]
fn a_clip_of_the_built_in_model_becomes_the_longer_one() {
    let bench = Bench::new();
    let ask = Generate::new().without("--model").without("--size").set("--steps", "2");
    let ask = ask.set("--video-steps", "2").prompt("a red star spins");
    bench.generate(&ask.clone().set("-o", "long.mp4").set("--units", "5")).ok();
    bench.generate(&ask.flag("--keep-units")).ok();
    on(&bench, "extend", "out.mp4", &["--frames", "33", "-o", "longer.mp4"]).ok();
    assert!(bench.read("longer.mp4") == bench.read("long.mp4"));
    on(&bench, "decode", "out.mp4", &["--frames", "33", "-o", "decoded.mp4"]).ok();
    assert!(bench.read("decoded.mp4") == bench.read("long.mp4"));
    // What the model was not made for is refused here, too.
    let long = ["--units", "10", "-o", "x.mp4"];
    on(&bench, "extend", "out.mp4", &long).fails(3, &["not made for 10 latent", "--force"]);
    let other = ["-o", "x.mp4", "--model", "sd3-384p"];
    on(&bench, "extend", "out.mp4", &other).fails(4, &["sd3-384p", "pull"]);
    on(&bench, "extend", "out.mp4", &[&long[..], &["--force"]].concat()).ok();
}

#[test]
fn a_clip_from_an_image_becomes_longer_without_the_image() {
    let bench = Bench::new();
    bench.generate(&Generate::to("first.png").set("--units", "1")).ok();
    let ask = Generate::new().set("--image", "first.png");
    bench.generate(&ask.clone().set("-o", "long.gif").set("--units", "3")).ok();
    bench.generate(&ask.set("-o", "out.gif").flag("--keep-units")).ok();
    fs::remove_file(bench.path("first.png")).expect("removable");
    on(&bench, "extend", "out.gif", &["--units", "3", "-o", "longer.gif"]).ok();
    assert!(bench.read("longer.gif") == bench.read("long.gif"));
}

#[test]
fn an_interrupted_run_is_completed_without_its_settings() {
    let bench = Bench::new();
    let ask = Generate::new().set("--units", "4").set("--steps", "30").set("--video-steps", "30");
    let mut running = bench.start(bench.command(ask.args()));
    assert!(running.wait_for(|f| f.iter().any(|f| f.ends_with("unit-0001.safetensors"))));
    running.signal("KILL");
    running.finish();
    // What is there can be seen; --units says how much of it.
    on(&bench, "decode", "out.mp4.units", &["-o", "part.y4m", "--units", "2"]).ok();
    let run = bench.generate(&ask.clone().set("-o", "-").set("--units", "2")).ok();
    run.check(run.stdout == bench.read("part.y4m"), "the frames of the shorter clip");
    on(&bench, "extend", "out.mp4.units", &[]).ok();
    bench.generate(&ask.set("-o", "whole.mp4")).ok();
    assert!(bench.read("out.mp4") == bench.read("whole.mp4"));
}

#[test]
fn latents_begin_a_video_with_another_prompt() {
    let bench = Bench::new();
    bench.generate(&Generate::new().set("--save-latents", "a.st")).ok();
    let ask = Generate::to("b.mp4").set("--latents", "a.st").without("--size").prompt("a bear");
    let longer = ask.clone().set("--units", "3").set("--save-latents", "b.st");
    bench.generate(&longer).ok();
    let units =
        |name: &str| pyraflow::pipeline::read_latents(&bench.path(name)).expect("latents").units;
    let (a, b) = (units("a.st"), units("b.st"));
    assert_eq!((a.len(), b.len()), (2, 3));
    assert!(a == b[..2]);
    // The same prompt goes on to the very same units.
    bench
        .generate(&longer.clone().prompt("a fox").set("-o", "c.mp4").set("--save-latents", "c.st"))
        .ok();
    bench.generate(&Generate::to("d.mp4").set("--units", "3").set("--save-latents", "d.st")).ok();
    assert!(units("c.st") == units("d.st") && units("c.st") != b);
    let ask = ask.set("-o", "e.mp4");
    bench.refuses(&ask.clone().set("--units", "1"), 3, &["2 latent frames already", "--units 2"]);
    bench.refuses(&ask.clone().set("--size", "128x64"), 3, &["a.st", "64x64", "--size 64x64"]);
    bench.refuses(&ask.clone().set("--image", "x.png"), 2, &["--image"]);
    bench.write("torn.st", &bench.read("a.st")[..999]);
    bench.refuses(&ask.set("--latents", "torn.st"), 3, &["torn.st holds no latents"]);
}

#[test]
fn what_is_no_state_is_refused() {
    let bench = Bench::new();
    bench.generate(&Generate::new()).ok();
    bench
        .generate(&Generate::to("kept.mp4").flag("--keep-units").set("--save-latents", "k.st"))
        .ok();
    fs::create_dir(bench.path("folder")).expect("a folder");
    let before = bench.files();
    for command in ["extend", "decode"] {
        for (state, parts) in [
            ("out.mp4", ["no latents of out.mp4 are kept", "--keep-units"]),
            ("folder", ["no latents of folder are kept", "--save-latents"]),
            ("nowhere", ["cannot open nowhere", "No such file"]),
        ] {
            on(&bench, command, state, &["-o", "x.mp4"]).fails(3, &parts);
        }
        on(&bench, command, "k.st", &["-o", "x.mp4"]).fails(4, &["not known", "--model"]);
        on(&bench, command, "k.st", &[]).fails(2, &["where should the video go"]);
        on(&bench, command, "kept.mp4", &[]).fails(2, &["kept.mp4 exists already"]);
        on(&bench, command, "kept.mp4", &["--seconds", "0.5", "-y"]).fails(3, &["0.33 and 0.67"]);
    }
    on(&bench, "decode", "kept.mp4", &["-y", "--units", "3"]).fails(3, &["2 latent frames, not 3"]);
    // Another model's.
    let flux = bench.copy_model("flux");
    let flux = flux.to_str().expect("UTF-8");
    let more = ["-o", "x.mp4", "--model", flux, "--units", "3"];
    on(&bench, "extend", "kept.mp4", &more).fails(3, &["family is \"sd3\" there"]);
    let more = ["-o", "x.mp4", "--model", flux];
    on(&bench, "decode", "k.st", &more).fails(3, &["of a sd3 model"]);
    let kept: Vec<String> = bench.files().into_iter().filter(|f| !f.starts_with("model")).collect();
    assert_eq!(kept, before);
}
