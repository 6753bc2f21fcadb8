//! Prompts and numbers: right ones work, wrong ones are refused with what is possible.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::harness::{Bench, Generate};

#[test]
fn impossible_settings_are_refused() {
    let bench = Bench::new();
    let refused: &[(&str, &str, i32, &[&str])] = &[
        ("--size", "0x64", 3, &["width of 0", "multiples of 64"]),
        ("--size", "64x0", 3, &["height of 0"]),
        ("--size", "65x64", 3, &["width of 65", "64 or 128"]),
        ("--size", "63x64", 3, &["width of 63", "nearest is 64"]),
        ("--size", "64x641", 3, &["height of 641", "640 or 704"]),
        ("--size", "99999x64", 3, &["width of 99999", "99968 or 100032"]),
        ("--size", "99968x64", 3, &["width"]),
        ("--size", "4294967232x4294967232", 3, &["cannot be sampled"]),
        ("--size", "1280x768", 3, &["1280x768", "positions for 384 pixels"]),
        ("--size", "4294967296x64", 2, &["--size", "4294967296"]),
        ("--size", "-64x64", 2, &["--size", "-64"]),
        ("--size", "640", 2, &["--size", "384p, 768p or WIDTHxHEIGHT"]),
        ("--size", "64x64x64", 2, &["--size"]),
        ("--steps", "0", 3, &["first unit", "1 to 1000"]),
        ("--steps", "1,0,1", 3, &["first unit", "1 to 1000"]),
        ("--steps", "1001", 3, &["1001", "1 to 1000"]),
        ("--steps", "1,2", 2, &["--steps", "found 2"]),
        ("--steps", "1,2,3,4", 2, &["--steps", "found 4"]),
        ("--steps", "-1", 2, &["--steps"]),
        ("--video-steps", "0", 3, &["later units", "1 to 1000"]),
        ("--video-steps", "", 2, &["--video-steps"]),
        ("--guidance", "nan", 3, &["guidance of NaN", "between 0 and 100"]),
        ("--guidance", "-1", 3, &["guidance of -1"]),
        ("--guidance", "inf", 3, &["guidance of inf"]),
        ("--guidance", "1e9", 3, &["between 0 and 100"]),
        ("--guidance", "high", 2, &["--guidance"]),
        ("--video-guidance", "nan", 3, &["video guidance of NaN"]),
        ("--units", "0", 3, &["0 latent frames", "1 to 4096"]),
        ("--units", "4097", 3, &["1 to 4096"]),
        ("--units", "18446744073709551615", 3, &["1 to 4096"]),
        ("--units", "-1", 2, &["'-1' for '--units"]),
        ("--seed", "-1", 2, &["'-1' for '--seed"]),
        ("--seed", "18446744073709551616", 2, &["--seed", "too large"]),
        ("--threads", "0", 2, &["0 threads", "1 to 1024"]),
        ("--threads", "100000", 2, &["100000 threads", "1 to 1024"]),
        ("--device", "tpu", 2, &["auto, cpu, cuda"]),
        ("--variant", "1080p", 2, &["1080p", "384p, 768p and image"]),
        ("--variant", "384p", 4, &["no 384p model", "it has 768p"]),
    ];
    for (name, value, code, parts) in refused {
        bench.refuses(&Generate::new().set(name, value), *code, parts);
    }
    for (flag, code, part) in [
        ("--tile=0", 3, "multiple of 32"),
        ("--tile=33", 3, "multiple of 32"),
        ("--linear-guidance=nan,1", 3, "linear guidance of NaN"),
        ("--linear-guidance=1", 2, "ALPHA,MIN"),
    ] {
        bench.refuses(&Generate::new().flag(flag), code, &[part]);
    }
}

#[test]
fn impossible_lengths_get_the_two_nearest() {
    let bench = Bench::new();
    let refused: &[(&str, &str, &[&str])] = &[
        ("--frames", "2", &["2 frames", "1 or 9"]),
        ("--frames", "8", &["8 frames", "1 or 9"]),
        ("--frames", "120", &["113 or 121"]),
        ("--frames", "0", &["0 frames", "nearest is 1"]),
        ("--frames", "4294967295", &["nearest is 4294967289\n"]),
        ("--seconds", "2.5", &["2.5 seconds", "2.33 and 2.67"]),
        ("--seconds", "nan", &["NaN seconds", "thirds"]),
        ("--seconds", "-1", &["-1.0 seconds", "thirds"]),
        ("--seconds", "1e300", &["1e300 seconds", "thirds"]),
        ("--seconds", "inf", &["inf seconds", "thirds"]),
    ];
    for (name, value, parts) in refused {
        bench.refuses(&Generate::new().without("--units").set(name, *value), 3, parts);
    }
    bench.refuses(&Generate::new().set("--frames", "9"), 2, &["--units", "--frames"]);
    for (name, value) in [("--frames", "9"), ("--seconds", "0.33")] {
        let ask = Generate::new().without("--units").set(name, value).flag("--json").flag("-y");
        let run = bench.generate(&ask).ok();
        run.check(run.events()[0]["units"] == 2, "two units");
    }
}

#[test]
fn the_largest_seed_works() {
    let bench = Bench::new();
    let ask = Generate::new().set("--seed", u64::MAX.to_string());
    let run = bench.generate(&ask).ok();
    run.check(run.stderr.contains("seed 18446744073709551615"), "the seed");
    // And so does none: the one that was drawn is shown.
    let run = bench.generate(&Generate::to("other.mp4").without("--seed")).ok();
    run.check(run.stderr.contains("seed "), "the seed");
}

#[test]
fn prompts_of_all_kinds_work() {
    let bench = Bench::new();
    for prompt in [
        "🦊🏽‍🚀 👩‍👩‍👧",
        "狐狸在雪中奔跑",
        "ثعلب يركض في الثلج",
        "<|endoftext|> </s>",
        "\u{1}\u{1b}[2J\r\n\t\u{202e}",
    ] {
        bench.generate(&Generate::new().prompt(prompt).set("--units", "1").flag("-y")).ok();
    }
}

#[test]
fn bad_prompts_are_refused() {
    let bench = Bench::new();
    let hint = "pyraflow generate \"";
    bench.refuses(&Generate::new().no_prompt(), 3, &["there is no prompt", hint]);
    bench.refuses(&Generate::new().prompt(""), 3, &["there is no prompt", hint]);
    bench.refuses(&Generate::new().prompt(" \n\t"), 3, &["there is no prompt", hint]);
    let invalid = || OsString::from_vec(b"a fox \xff\xfe".to_vec());
    bench.refuses(&Generate::new().prompt(invalid()), 3, &["the prompt is not valid UTF-8"]);
    for (option, what) in [("--negative", "the negative prompt"), ("--suffix", "the suffix")] {
        bench.refuses(&Generate::new().set(option, invalid()), 3, &[what, "not valid UTF-8"]);
    }
    bench.refuses(&Generate::new().set("--suffix", "x").flag("--no-suffix"), 2, &["--suffix"]);
}

#[test]
fn a_huge_prompt_works_and_shows_what_was_lost() {
    let bench = Bench::new();
    // One argument may take 128 KiB on Linux; the whole megabyte goes through the suffix,
    // the negative prompt and the prompt itself.
    let part = |word: &str| word.repeat(120_000 / word.len());
    let ask = Generate::new()
        .set("--units", "1")
        .prompt(part("fox runs "))
        .set("--suffix", format!("{}lastword", part("snow ")))
        .set("--negative", part("blur "));
    let run = bench.generate(&ask).ok();
    for encoder in ["CLIP takes 77 tokens; cut off: “", "T5 takes 128 tokens; cut off: “"] {
        run.check(run.stderr.contains(encoder), encoder);
    }
    run.check(run.stderr.contains("fox runs fox runs"), "the beginning of what was lost");
    run.check(run.stderr.len() < 4000, "a warning that can be read");
    // A prompt that fits says nothing.
    let run = bench.generate(&Generate::new().prompt("a fox").flag("--no-suffix").flag("-y")).ok();
    run.check(!run.stderr.contains("too long"), "no warning");
}
