//! Seeing a video before it is complete changes nothing about it.

use std::fs;

use crate::harness::{Bench, Generate};

#[test]
fn previews_change_no_byte() {
    let bench = Bench::new();
    let ask = Generate::new().without("--model").without("--size").set("--units", "3");
    let demo = |output: &str| ask.clone().set("-o", output);
    bench.generate(&demo("plain.mp4")).ok();
    let plain = bench.read("plain.mp4");
    bench.generate(&demo("a.mp4").set("--preview", "seen")).ok();
    assert!(bench.read("a.mp4") == plain);
    let mut seen: Vec<String> =
        (0..9).map(|i| format!("seen/unit-{:04}-stage-{}.png", i / 3, i % 3 + 1)).collect();
    seen.push("seen/latest.png".into());
    seen.sort();
    let found = |folder: &str| -> Vec<String> {
        bench.files().into_iter().filter(|f| f.starts_with(folder) && f.ends_with("png")).collect()
    };
    assert_eq!(found("seen/"), seen);
    let picture = |name: &str| image::open(bench.path(name)).expect("a PNG").to_rgb8();
    assert!(seen.iter().all(|name| picture(name).dimensions() == (128, 128)));

    // With real frames: the last of each unit, and close to what the latents showed.
    let frames = demo("b.mp4").set("--preview", "real").flag("--preview-frames");
    bench.generate(&frames).ok();
    assert!(bench.read("b.mp4") == plain);
    assert_eq!(found("real/").len(), 13);
    bench.generate(&demo("frames.png")).ok();
    let last = picture("frames-00016.png");
    assert!(picture("real/unit-0002.png") == last);
    let guess = picture("real/unit-0002-stage-3.png");
    let error: u64 = guess.iter().zip(last.iter()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    let mean = error as f64 / last.len() as f64;
    assert!(mean < 40.0, "the picture of latents is off by {mean:.1} on average");
    assert!(guess.iter().any(|&v| v > 128), "and shows something");
}

#[test]
fn a_vae_without_a_map_shows_real_frames_and_then_finds_one() {
    let bench = Bench::new();
    let ask = Generate::new().set("--size", "128x128").set("--units", "3");
    bench.generate(&ask.clone().set("-o", "plain.mp4")).ok();
    bench.generate(&ask.set("--preview", "seen")).ok();
    assert!(bench.read("out.mp4") == bench.read("plain.mp4"));
    let seen = bench.files();
    assert!(seen.contains(&"seen/unit-0000.png".into()), "{seen:?}");
    assert!(!seen.contains(&"seen/unit-0000-stage-1.png".into()), "{seen:?}");
    assert!(seen.contains(&"seen/unit-0001-stage-1.png".into()), "{seen:?}");
}

#[test]
fn a_video_can_be_watched_while_it_grows() {
    let bench = Bench::new();
    let ask = Generate::new().set("--units", "4").set("--steps", "20").set("--video-steps", "40");
    bench.generate(&ask.clone().set("-o", "plain.mp4")).ok();
    let mut running = bench.start(bench.command(ask.clone().flag("--follow").args()));
    // Complete fragments of the first units, long before the end.
    let mut lengths = Vec::new();
    let live = bench.path("out.live.mp4");
    let grew = running.wait_for(|_| {
        let length = fs::metadata(&live).map_or(0, |m| m.len());
        if length > lengths.last().copied().unwrap_or(0) {
            lengths.push(length);
        }
        lengths.len() >= 3
    });
    assert!(grew, "it grows unit by unit: {lengths:?}");
    running.finish().ok();
    assert!(bench.read("out.mp4") == bench.read("plain.mp4"));
    assert!(!live.exists());

    let piped = bench.generate(&ask.clone().set("-o", "-").flag("--follow")).ok();
    let plain = bench.generate(&ask.clone().set("-o", "-")).ok();
    assert!(piped.stdout == plain.stdout);

    // Interrupted, it leaves its units and nothing else.
    let mut running = bench.start(bench.command(ask.clone().flag("--follow").flag("-y").args()));
    assert!(running.wait_for(|_| live.exists()));
    running.signal("INT");
    running.finish().fails(130, &["--resume goes on"]);
    assert!(!live.exists());
    bench.generate(&ask.clone().flag("--follow").flag("-y").flag("--resume")).ok();
    assert!(bench.read("out.mp4") == bench.read("plain.mp4"));
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let bench = Bench::new();
    bench.refuses(&Generate::to("a.gif").flag("--follow"), 2, &["cannot be watched", ".mp4"]);
    bench.refuses(&Generate::new().flag("--preview-frames"), 2, &["--preview"]);
    bench.refuses(&Generate::new().set("--preview", "terminal"), 2, &["no terminal", "DIR"]);
    bench.refuses(&Generate::new().flag("--follow").flag("--tile"), 2, &["--tile"]);
}
