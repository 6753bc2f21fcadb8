//! Options from the environment and from files, presets, logs and sidecars.

use std::fs;

use serde_json::Value;

use crate::harness::{Bench, Generate};

/// The first event of a run with these variables set.
fn start(bench: &Bench, ask: &Generate, variables: &[(&str, &str)]) -> Value {
    let mut command = bench.command(ask.clone().flag("-y").flag("--json").args());
    command.envs(variables.iter().copied());
    let run = bench.start(command).finish().ok();
    run.events()[0].clone()
}

#[test]
fn typed_wins_over_the_environment_and_that_over_files() {
    let bench = Bench::new();
    let ask = Generate::new().without("--units").without("--seed");
    bench.write(
        "a.toml",
        "seed = 5\n[generate]\nunits = 1\nlinear-guidance = [3, 2]\n[plan]\njson = true\n",
    );
    let from = |file: &str| ask.clone().set("--config", file);
    let event = start(&bench, &from("a.toml"), &[]);
    assert_eq!((&event["seed"], &event["units"]), (&5.into(), &1.into()));
    let run = bench.run(["inspect", "--json", "out.mp4"]).ok().text();
    let info: Value = serde_json::from_str(&run).expect("JSON");
    assert_eq!(info["settings"]["linear_guidance"]["alpha"], 3.0);
    let event = start(&bench, &from("a.toml"), &[("PYRAFLOW_SEED", "6")]);
    assert_eq!((&event["seed"], &event["units"]), (&6.into(), &1.into()));
    let event = start(&bench, &from("a.toml").set("--seed", "7"), &[("PYRAFLOW_SEED", "6")]);
    assert_eq!(event["seed"], 7);
    // Of those that exclude each other, the stronger one silences the others.
    let event = start(&bench, &from("a.toml").set("--frames", "9"), &[("PYRAFLOW_SECONDS", "1")]);
    assert_eq!(event["units"], 2);
    let event = start(&bench, &from("a.toml"), &[("PYRAFLOW_FRAMES", "9")]);
    assert_eq!(event["units"], 2);
    let event = start(&bench, &ask, &[("PYRAFLOW_CONFIG", "a.toml"), ("PYRAFLOW_QUIET", "1")]);
    assert_eq!(event["seed"], 5);

    // The user's own file.
    fs::create_dir_all(bench.path("config/pyraflow")).expect("a folder");
    bench.write("config/pyraflow/config.toml", "seed = 11\nquiet = true\nno-suffix = true\n");
    let quick = ask.clone().set("--units", "1").set("-o", "b.mp4");
    let run = bench.generate(&quick).ok();
    run.check(!run.stderr.contains("seed"), "quiet");
    let run = bench.run(["inspect", "b.mp4"]).ok().text();
    assert!(run.contains("seed  11\n") && run.contains("suffix  \n"), "{run}");
}

#[test]
fn wrong_files_are_refused() {
    let bench = Bench::new();
    for (text, part) in [
        ("seeed = 1", "seeed: no command has such an option"),
        ("[generate]\nstate = 1", "state: not generate has such an option"),
        ("[paint]\nseed = 1", "paint"),
        ("seed = 2020-01-01", "seed: a text, number"),
        ("seed = ", "is not TOML"),
    ] {
        bench.write("a.toml", text);
        bench.refuses(&Generate::new().set("--config", "a.toml"), 2, &["a.toml", part]);
    }
    bench.write("a.toml", "seed = -1");
    let ask = Generate::new().without("--seed").set("--config", "a.toml");
    bench.refuses(&ask, 2, &["-1", "--seed"]);
    bench.refuses(&Generate::new().set("--config", "no.toml"), 2, &["cannot read no.toml"]);
}

#[test]
fn presets_and_timings_are_told() {
    let bench = Bench::new();
    let ask = Generate::new().without("--steps").without("--video-steps").set("--units", "1");
    for (flag, first, later) in [("--fast", 10, 5), ("--best", 20, 20)] {
        let ask = ask.clone().flag(flag).flag("-y").flag("--sidecar").set("--log", "json");
        let run = bench.generate(&ask).ok();
        run.check(run.stdout.is_empty(), "nothing on standard output");
        let events: Vec<Value> =
            run.stderr.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        assert_eq!(events[0]["event"], "start");
        let done = events.last().expect("the end");
        assert!(done["seconds"]["decoding"].as_f64().is_some_and(|s| s > 0.0), "{done}");
        let sidecar: Value = serde_json::from_slice(&bench.read("out.mp4.json")).expect("JSON");
        assert_eq!(sidecar["steps"], serde_json::json!([first, first, first]));
        assert_eq!(sidecar["video_steps"], serde_json::json!([later, later, later]));
        assert_eq!(sidecar["seconds"], done["seconds"]);
        assert_eq!(sidecar["seed"], 1);
    }
    bench.refuses(&ask.clone().flag("--sidecar"), 2, &["out.mp4", "exists already"]);
    bench.refuses(&ask.clone().flag("--fast").flag("--best"), 2, &["--fast", "--best"]);
    let run = bench.generate(&ask.set("--log", "json").set("--size", "63x64"));
    let error: Value = serde_json::from_str(run.stderr.trim()).expect("JSON");
    assert_eq!((&error["event"], &error["exit_code"]), (&"error".into(), &3.into()));
    assert!(error["hint"].as_str().is_some_and(|h| h.contains("64")), "{error}");
}

#[test]
fn a_default_for_all_commands_reaches_only_those_that_mean_the_same() {
    let bench = Bench::new();
    bench.generate(&Generate::new().set("--units", "1").set("-o", "a.png")).ok();
    bench.write("a.toml", "json = true\nmodel = \"nowhere\"\n");
    // What is inspected is what was typed, and its JSON is asked for.
    let run = bench.run(["inspect", "a.png", "--config", "a.toml"]).ok();
    assert!(serde_json::from_str::<Value>(&run.text()).is_ok());
    let mut command = bench.command(["inspect", "a.png"]);
    command.envs([("PYRAFLOW_JSON", "1"), ("PYRAFLOW_MODEL", "nowhere")]);
    let run = bench.start(command).finish().ok();
    assert!(serde_json::from_str::<Value>(&run.text()).is_ok());
    // `bench --json` names a file: the model is refused before any is written.
    let typed = ["bench", "--config", "a.toml", "--image", "a.png"];
    bench.run(typed).fails(2, &["bench measures text to video"]);
    let mut command = bench.command(["bench", "--model", "sd3-384p", "--image", "a.png"]);
    command.env("PYRAFLOW_JSON", "no");
    bench.start(command).finish().fails(2, &["bench measures text to video"]);
    bench.write("a.toml", "[bench]\njson = 1.5\n[plan]\njson = 1.5\n");
    bench
        .run(typed[..3].iter().chain(&["--model", "sd3-384p", "--image", "a.png"]).copied())
        .fails(2, &["bench measures text to video"]);
    bench.run(["plan", "--config", "a.toml", "--model", "sd3-384p"]).fails(2, &["1.5", "--json"]);
}
