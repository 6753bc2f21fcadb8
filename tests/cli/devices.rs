//! Devices that are not there, and the report of those that are. All GPUs are hidden, so that
//! these hold on every machine.

use serde_json::Value;

use crate::harness::{Bench, Generate, Run};

/// A run on a machine that shows no GPU.
fn run(bench: &Bench, args: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Run {
    let mut command = bench.command(args);
    command.env("CUDA_VISIBLE_DEVICES", "");
    bench.start(command).finish()
}

#[test]
fn a_gpu_that_is_not_there_is_a_sentence_and_a_code() {
    let bench = Bench::new();
    for device in ["cuda", "cuda:0", "cuda:7"] {
        let run = run(&bench, Generate::new().set("--device", device).args());
        run.check(run.code() == Some(5), "exit code 5");
        let errors = run.stderr.matches("error: ").count();
        run.check(errors == 1 && run.stderr.lines().count() == 2, "one error and one hint");
        let named = ["no NVIDIA driver", "libcuda.so", "CUDA_VISIBLE_DEVICES"];
        run.check(named.iter().any(|part| run.stderr.contains(part)), "the reason");
        run.check(run.stderr.contains("hint: "), "what to do");
        assert!(bench.files().is_empty(), "nothing is left: {:?}", bench.files());
    }
}

#[test]
fn without_a_gpu_the_best_device_is_the_cpu() {
    let bench = Bench::new();
    run(&bench, Generate::new().set("--device", "auto").args()).ok();
    assert_eq!(bench.files(), ["out.mp4"]);
}

#[test]
fn devices_that_do_not_exist_are_refused() {
    let bench = Bench::new();
    for device in ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1:2", "cpu:1", "auto:0", "CUDA", ""] {
        bench.refuses(&Generate::new().set("--device", device), 2, &["auto, cpu, cuda or cuda:N"]);
    }
}

#[test]
fn doctor_reports_a_machine_without_gpu() {
    let bench = Bench::new();
    let text = run(&bench, ["doctor"]).ok().text();
    for part in ["pyraflow  0.", "kernels  ", "driver  ", "cuBLASLt  ", "threads", "GiB free"] {
        assert!(text.contains(part), "{part:?} in:\n{text}");
    }
    assert!(text.contains("problem   ") && text.contains("hint: "), "{text}");
    assert!(text.ends_with("--device cpu\n"), "{text}");

    let json = run(&bench, ["doctor", "--json"]).ok();
    let found: Value = serde_json::from_str(&json.text()).unwrap_or_else(|e| panic!("{e}\n{json}"));
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(found["gpus"], serde_json::json!([]));
    assert_eq!(found["gpu"], Value::Null);
    assert!(found["problem"]["problem"].is_string() && found["problem"]["hint"].is_string());
    assert!(found["cpu"]["threads"].as_u64() > Some(0));
    assert!(found["cpu"]["memory_total"].as_u64() >= found["cpu"]["memory_available"].as_u64());
    let built = found["kernels"]["targets"].as_array().expect("a list");
    assert_eq!(found["kernels"]["nvcc"].is_string(), !built.is_empty());
}
