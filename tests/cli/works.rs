//! What should work, works: every output, every setting, the same bytes every time.

use serde_json::Value;

use crate::harness::{Bench, Generate, Run, golden};

/// The frames as raw y4m, which carries no settings.
pub fn frames(bench: &Bench, ask: &Generate) -> Vec<u8> {
    let run = bench.generate(&ask.clone().set("-o", "-")).ok();
    run.check(run.stdout.starts_with(b"YUV4MPEG2 "), "a y4m stream");
    run.stdout
}

/// What `inspect` says about an output.
fn inspect(bench: &Bench, name: &str) -> Value {
    let run = bench.run(["inspect", "--json", name]).ok();
    serde_json::from_str(&run.text()).unwrap_or_else(|e| panic!("{e}\n{run}"))
}

#[test]
fn a_prompt_becomes_a_video_that_tells_how_it_was_made() {
    let bench = Bench::new();
    let ask = Generate::new().set("--steps", "3,2,1").set("--guidance", "6.5");
    let run = bench.generate(&ask.set("--negative", "rain")).ok();
    run.check(run.stdout.is_empty(), "nothing on standard output");
    run.check(run.stderr.contains("seed 1\n"), "the seed");
    run.check(run.stderr.contains("64x64 with 9 frames may look bad"), "a warning");
    run.check(run.stderr.contains("wrote out.mp4: 9 frames of 64x64"), "a summary");
    assert_eq!(bench.files(), ["out.mp4"], "no units are left");
    assert_eq!(&bench.read("out.mp4")[4..8], b"ftyp");

    let found = inspect(&bench, "out.mp4");
    assert_eq!(found["format"], "mp4");
    assert_eq!(found["frames"], 9);
    assert_eq!((&found["width"], &found["height"]), (&64.into(), &64.into()));
    let settings = &found["settings"];
    assert_eq!(settings["prompt"], "a fox");
    assert_eq!(settings["negative"], "rain");
    assert_eq!(settings["suffix"], ", hyper quality, Ultra HD, 8K");
    assert_eq!(settings["seed"], 1);
    assert_eq!(settings["units"], 2);
    assert_eq!(settings["steps"], serde_json::json!([3, 2, 1]));
    assert_eq!(settings["guidance"], 6.5);
    let text = bench.run(["inspect", "out.mp4"]).ok().text();
    assert!(text.contains("mp4 64x64, 9 frames at 24.00"), "{text}");
    assert!(text.contains("seed  1\n") && text.contains("prompt  a fox\n"), "{text}");
}

#[test]
fn every_format_is_written() {
    let bench = Bench::new();
    bench.generate(&Generate::to("one.png").set("--units", "1")).ok();
    bench.generate(&Generate::to("many.png")).ok();
    bench.generate(&Generate::to("out.gif")).ok();
    bench.generate(&Generate::to("out.y4m")).ok();
    let mut wanted: Vec<String> = (0..9).map(|i| format!("many-{i:05}.png")).collect();
    wanted.extend(["one.png", "out.gif", "out.y4m"].map(String::from));
    assert_eq!(bench.files(), wanted);
    for (name, format, frames) in
        [("one.png", "png", 1), ("many-00008.png", "png", 1), ("out.gif", "gif", 9)]
    {
        let found = inspect(&bench, name);
        assert_eq!(found["format"], format, "{name}");
        assert_eq!(found["frames"], frames, "{name}");
        assert_eq!(found["settings"]["seed"], 1, "{name}");
    }
    let image = image::open(bench.path("one.png")).expect("a PNG").to_rgb8();
    assert_eq!(image.dimensions(), (64, 64));
    assert_eq!(frames(&bench, &Generate::new()), bench.read("out.y4m"));
}

#[test]
fn json_events_tell_the_whole_run() {
    let bench = Bench::new();
    let run = bench.generate(&Generate::new().flag("--json")).ok();
    run.check(run.stderr.is_empty(), "nothing for people");
    let events = run.events();
    let named = |name: &str| events.iter().filter(|e| e["event"] == name).collect::<Vec<_>>();
    run.check(events[0]["event"] == "start" && events[0]["seed"] == 1, "a start with the seed");
    run.check(named("warning").len() == 1, "the warning of the size");
    let phases: Vec<_> = named("finished").iter().map(|e| e["phase"].clone()).collect();
    run.check(phases == ["loading", "text", "sampling", "decoding"], "all phases in order");
    for phase in ["loading", "text", "sampling", "decoding"] {
        let last = named("progress").into_iter().rfind(|e| e["phase"] == phase);
        run.check(last.is_some_and(|e| e["done"] == e["total"]), "progress to the end");
    }
    let done = &events[events.len() - 1];
    run.check(done["event"] == "done" && done["frames"] == 9, "the end");
    run.check(done["output"] == "out.mp4", "the output");
}

#[test]
fn quiet_is_quiet() {
    let bench = Bench::new();
    let run = bench.generate(&Generate::new().flag("--quiet")).ok();
    run.check(run.stdout.is_empty(), "nothing on standard output");
    let only_warnings = run.stderr.lines().all(|line| line.starts_with("warning: "));
    run.check(only_warnings, "nothing but warnings");
    bench.refuses(&Generate::new().flag("--quiet").flag("-y"), 2, &["--quiet", "--json"]);
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let bench = Bench::new();
    bench.generate(&Generate::to("a.mp4")).ok();
    bench.generate(&Generate::to("b.mp4")).ok();
    bench.generate(&Generate::to("one.mp4").set("--threads", "1")).ok();
    bench.generate(&Generate::to("two.mp4").set("--threads", "2")).ok();
    bench.generate(&Generate::to("other.mp4").set("--seed", "2")).ok();
    let first = bench.read("a.mp4");
    for same in ["b.mp4", "one.mp4", "two.mp4"] {
        assert!(bench.read(same) == first, "{same}");
    }
    let (one, other) = (Generate::new(), Generate::new().set("--seed", "2"));
    assert!(frames(&bench, &one) != frames(&bench, &other), "another seed, other frames");
}

#[test]
fn every_setting_changes_the_video() {
    let bench = Bench::new();
    let plain = Generate::new().set("--units", "3");
    let first = frames(&bench, &plain);
    for (name, changed) in [
        ("--guidance 0", plain.clone().set("--guidance", "0")),
        ("--linear-guidance", plain.clone().flag("--linear-guidance")),
        ("--linear-guidance=2,3", plain.clone().flag("--linear-guidance=2,3")),
        ("--video-guidance", plain.clone().set("--video-guidance", "2")),
        ("--no-suffix", plain.clone().flag("--no-suffix")),
        ("--suffix", plain.clone().set("--suffix", " in snow")),
        ("--negative", plain.clone().set("--negative", "rain")),
        ("--steps", plain.clone().set("--steps", "2")),
        ("--video-steps", plain.clone().set("--video-steps", "2,1,1")),
        ("prompt", plain.clone().prompt("a bear")),
    ] {
        let other = frames(&bench, &changed);
        assert_eq!(other.len(), first.len(), "{name}");
        assert!(other != first, "{name}");
    }
}

#[test]
fn tiles_are_used_where_they_are_smaller_than_the_frame() {
    let bench = Bench::new();
    let ask = Generate::new().set("--size", "192x128");
    let whole = frames(&bench, &ask);
    let tiled = frames(&bench, &ask.clone().flag("--tile=64"));
    assert_eq!(whole.len(), tiled.len());
    assert!(whole != tiled, "group norms see one tile");
    // Tiles of four sizes take turns, the whole ones more than once.
    assert!(frames(&bench, &ask.clone().flag("--tile=64")) == tiled, "the same every time");
    assert!(frames(&bench, &ask.flag("--tile")) == whole, "one tile of 256 holds the frame");
}

#[test]
fn miniflux_works_and_its_weights_are_converted_once() {
    let bench = Bench::new();
    let model = bench.copy_model("flux");
    let loading = |run: &Run| {
        let events = run.events();
        events.iter().filter(|e| e["event"] == "progress" && e["phase"] == "loading").count()
    };
    let ask = Generate::new().set("--model", model).flag("--json");
    let first = bench.generate(&ask).ok();
    first.check(loading(&first) > 0, "progress of the conversion");
    let second = bench.generate(&ask.clone().set("-o", "again.mp4")).ok();
    second.check(loading(&second) == 0, "no second conversion");
    assert!(bench.read("out.mp4") == bench.read("again.mp4"));
    assert_eq!(inspect(&bench, "out.mp4")["settings"]["family"], "miniflux");
    // Without --store the checkpoint's own folder holds the converted weights.
    bench.generate(&ask.without("--store").set("-o", "third.mp4")).ok();
    assert!(bench.path("model/.pyraflow").is_dir());
    assert!(bench.read("out.mp4") == bench.read("third.mp4"));
}

#[test]
fn plan_shows_every_phase() {
    let bench = Bench::new();
    for family in ["sd3", "flux"] {
        let model = golden(family).into_os_string();
        let small = ["--size", "192x128", "--force", "--units", "4"];
        let mut args = vec!["plan".into(), "--model".into(), model];
        args.extend(small.map(Into::into));
        let table = bench.run(&args).ok().text();
        for word in ["192x128, 4 latent frames", "text", "sampling", "decoding", "arena MiB"] {
            assert!(table.contains(word), "{word}: {table}");
        }
        args.push("--json".into());
        let phases = planned_phases(&bench.run(&args).ok());
        assert_eq!(phases, ["text", "sampling", "decoding"], "{family}");
    }
    assert_eq!(bench.files(), Vec::<String>::new());
}

/// The names of the phases of `plan --json`, each of them checked.
fn planned_phases(run: &Run) -> Vec<String> {
    let plan: Value = serde_json::from_str(&run.text()).unwrap_or_else(|e| panic!("{e}\n{run}"));
    let phases = plan["phases"].as_array().expect("phases");
    for phase in phases {
        let bytes = |name: &str| phase[name].as_u64().expect("a number");
        run.check(bytes("arena_bytes") > 0 && bytes("flops") > 0, "something to do");
        run.check(bytes("weight_bytes") > 0, "weights");
        run.check(bytes("arena_bytes") <= bytes("unshared_bytes"), "memory that is shared");
    }
    phases.iter().map(|p| p["name"].as_str().expect("a name").to_string()).collect()
}

#[test]
fn plan_of_the_published_model_shares_its_memory() {
    let bench = Bench::new();
    let run = bench.run(["plan", "--model", "sd3-768p", "--json"]).ok();
    let plan: Value = serde_json::from_str(&run.text()).expect("JSON");
    assert_eq!((&plan["width"], &plan["height"]), (&1280.into(), &768.into()));
    assert_eq!(planned_phases(&run), ["text", "sampling", "decoding"]);
    for phase in plan["phases"].as_array().expect("phases") {
        let bytes = |name: &str| phase[name].as_u64().expect("a number");
        let shared = 3 * bytes("arena_bytes") < bytes("unshared_bytes");
        run.check(shared, &format!("{}: below a third of the unshared sum", phase["name"]));
    }
    let sizes = ["plan", "--model", "sd3-768p", "--seconds", "2.5"];
    bench.run(sizes).fails(3, &["2.5 seconds", "2.33 and 2.67"]);
    bench
        .run(["plan", "--model", "sd3-1080p"])
        .fails(4, &["no checkpoint folder sd3-1080p", "sd3-384p"]);
    let big = ["plan", "--model", "sd3-768p", "--size", "4096x64", "--force"];
    bench.run(big).fails(3, &["4096x64", "positions for 3072 pixels"]);
}

#[test]
fn plan_tells_what_waits_in_memory_and_what_in_a_file() {
    let bench = Bench::new();
    let args = |host: Option<&'static str>| {
        let limit = host.into_iter().flat_map(|host| ["--max-host", host]);
        let args = ["plan", "--model", "sd3-768p", "--max-vram", "6G", "--json"];
        args.into_iter().chain(limit).collect::<Vec<_>>()
    };
    let decoding = |host| {
        let run = bench.run(args(host)).ok();
        let plan: Value = serde_json::from_str(&run.text()).expect("JSON");
        let bytes = |name: &str| plan["phases"][2][name].as_u64().expect("a number");
        (bytes("pinned_bytes"), bytes("scratch_bytes"))
    };
    let (pinned, scratch) = decoding(None);
    assert!(pinned > 4 << 30 && scratch == 0, "{pinned} and {scratch} bytes");
    let (less, scratch) = decoding(Some("4G"));
    assert!(less < 4 << 30 && less + scratch > pinned, "{less} and {scratch} bytes");
    bench.run(args(Some("0.5G"))).fails(6, &["0.50 GiB of host memory", "--max-host", "0.88G"]);
}

#[test]
fn plan_refuses_a_host_limit_without_a_gpu() {
    let bench = Bench::new();
    let plan = ["plan", "--model", "sd3-384p", "--units", "1", "--json"];
    let typed = plan.iter().chain(&["--max-host", "4G"]).copied();
    bench.run(typed).fails(2, &["--max-host limits", "add --max-vram SIZE"]);
    // One that stands for all commands is beside a GPU's only.
    let max_host = |variables: &[(&str, &str)]| {
        let mut command = bench.command(plan);
        command.envs(variables.iter().copied());
        let run = bench.start(command).finish().ok();
        serde_json::from_str::<Value>(&run.text()).expect("JSON")["max_host"].clone()
    };
    let (host, gpu) = (("PYRAFLOW_MAX_HOST", "4G"), ("PYRAFLOW_MAX_VRAM", "6G"));
    assert_eq!(max_host(&[host]), Value::Null);
    assert_eq!(max_host(&[host, gpu]), 4u64 << 30);
    bench.write("a.toml", "max-host = \"3G\"\n");
    let file = ("PYRAFLOW_CONFIG", "a.toml");
    assert_eq!(max_host(&[file]), Value::Null);
    assert_eq!(max_host(&[file, gpu]), 3u64 << 30);
}

#[test]
fn help_and_version_work_and_unknown_arguments_do_not() {
    let bench = Bench::new();
    let help = bench.run(["generate", "--help"]).ok().text();
    for word in ["--resume", "--seed", "--linear-guidance", "PROMPT"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    assert!(bench.run(["--version"]).ok().text().starts_with("pyraflow "));
    bench.run(["generate", "--fps", "30"]).fails(2, &["--fps"]);
    bench.run(["paint"]).fails(2, &["paint"]);
    bench.run(["plan"]).fails(2, &["--model"]);
}

#[test]
fn inspect_refuses_what_it_cannot_read() {
    let bench = Bench::new();
    bench.write("file", "hello");
    bench.write("empty.mp4", "");
    std::fs::create_dir(bench.path("folder")).expect("a folder");
    bench.run(["inspect", "file"]).fails(3, &["cannot understand file"]);
    bench.run(["inspect", "empty.mp4"]).fails(3, &["empty.mp4"]);
    bench.run(["inspect", "nothing.mp4"]).fails(3, &["cannot open nothing.mp4"]);
    bench.run(["inspect", "folder"]).fails(4, &["folder holds no checkpoint"]);
    let text = bench.run(["inspect".into(), golden("sd3").into_os_string()]).ok().text();
    assert!(text.starts_with("sd3 checkpoint with 768p\n"), "{text}");
    bench.generate(&Generate::new()).ok();
    let whole = bench.read("out.mp4");
    for length in (0..whole.len()).step_by(whole.len() / 20 + 1) {
        bench.write("torn.mp4", &whole[..length]);
        let run = bench.run(["inspect", "torn.mp4"]);
        run.check(matches!(run.code(), Some(0 | 3)), "an answer or a refusal");
    }
}
