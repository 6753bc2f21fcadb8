//! Every op at the shapes of the published models at 768p.
//!
//! The graphs are those that the test `gpu_ops` holds to the CPU, with the same seeded
//! inputs; the device's caches are flushed between runs, and each figure is the median of
//! several runs after one to warm up. Arithmetic is that of the matrix products without
//! masked pairs; bytes are inputs, weights and outputs once each, so that an op bound by
//! memory can be held to the rate of a large copy on the device, measured in the same run.
//!
//! `cargo bench --bench ops [-- NAME ... --variant NAME --repeats N --json FILE]`. With
//! `--cpu --scale small` it shows its table on a machine without a GPU.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use pyraflow::cases::{Case, Gpu, Scale, cases, gpu};
use pyraflow::exec::{Backend, Cpu};
use pyraflow::{ErrorKind, Result};
use serde_json::{Value, json};

struct Options {
    scale: Scale,
    repeats: usize,
    json: Option<PathBuf>,
    variant: Option<String>,
    filters: Vec<String>,
    cpu: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            scale: Scale::Bench,
            repeats: 20,
            json: None,
            variant: None,
            filters: Vec::new(),
            cpu: false,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--scale" => options.scale = value()?.parse()?,
                "--repeats" => {
                    let text = value()?;
                    let count = text.parse().ok().filter(|&n: &usize| n > 0);
                    options.repeats = count.ok_or(format!("--repeats {text}: how many?"))?;
                }
                "--json" => options.json = Some(value()?.into()),
                "--variant" => options.variant = Some(value()?),
                "--cpu" => options.cpu = true,
                // What cargo adds.
                "--bench" => {}
                _ if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
                _ => options.filters.push(arg),
            }
        }
        Ok(options)
    }
}

/// What is timed.
struct Device<'a> {
    name: String,
    driver: String,
    variant: &'a str,
    backend: &'a dyn Backend,
    /// Bytes per second of a large copy.
    copy_rate: Option<f64>,
}

impl<'a> Device<'a> {
    fn of(gpu: &'a Gpu, variant: Option<&str>) -> Result<Device<'a>, String> {
        let names: Vec<_> = gpu.variants.iter().map(|v| v.name).collect();
        let found = gpu.variants.iter().find(|v| variant.is_none_or(|name| v.name == name));
        let found = found.ok_or(format!("no such --variant: {}", names.join(", ")))?;
        Ok(Device {
            name: gpu.name.clone(),
            driver: gpu.driver.clone(),
            variant: found.name,
            backend: &*found.plain,
            copy_rate: Some((gpu.copy_rate)().map_err(|e| e.to_string())?),
        })
    }
}

/// The commit that was built: `PYRAFLOW_COMMIT`, or what git says of the sources.
fn commit() -> String {
    if let Ok(commit) = std::env::var("PYRAFLOW_COMMIT") {
        return commit;
    }
    let folder = env!("CARGO_MANIFEST_DIR");
    let git = Command::new("git").args(["-C", folder, "describe", "--always", "--dirty"]).output();
    match git {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_string()
        }
        _ => "unknown".into(),
    }
}

/// Prints a line of the table and returns it for the file.
fn measure(case: &Case, device: &Device<'_>, repeats: usize) -> Result<Value> {
    let mut times = case.open(device.backend)?.time(repeats)?;
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let (flops, bytes) = case.work(device.backend.activations())?;
    let [flop_rate, byte_rate] = [flops, bytes].map(|n| n as f64 / seconds);
    let of_copy = device.copy_rate.map(|rate| byte_rate / rate);
    println!(
        "{:<62}{:>11.3}{:>10}{:>10.1}{:>9}",
        case.name,
        seconds * 1e3,
        if flops == 0 { "-".into() } else { format!("{:.1}", flop_rate / 1e12) },
        byte_rate / 1e9,
        of_copy.map_or("-".into(), |share| format!("{:.0}%", 100.0 * share)),
    );
    Ok(json!({
        "op": case.op,
        "case": case.name,
        "shapes": case.shapes()?,
        "flops": flops,
        "bytes": bytes,
        "median_seconds": seconds,
        "least_seconds": times[0],
        "tflops": flop_rate / 1e12,
        "gbytes_per_second": byte_rate / 1e9,
        "share_of_copy_rate": of_copy,
    }))
}

/// `benches/results/ops-nvidia-h100-80gb-hbm3.json`, or in the working folder where the
/// sources are not.
fn default_file(device: &Device<'_>, scale: Scale) -> PathBuf {
    let mut name = String::from("ops");
    for word in device.name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()) {
        name += &format!("-{}", word.to_lowercase());
    }
    if scale != Scale::Bench {
        name += &format!("-{scale}");
    }
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let folder = if results.is_dir() { results } else { PathBuf::new() };
    folder.join(format!("{name}-{}.json", device.variant))
}

fn bench(options: &Options, device: &Device<'_>) -> Result<(), String> {
    let selected: Vec<_> = cases(options.scale)
        .into_iter()
        .filter(|c| {
            options.filters.is_empty() || options.filters.iter().any(|f| c.name.contains(f))
        })
        .collect();
    println!("{}, driver {}, {} kernels", device.name, device.driver, device.variant);
    if let Some(rate) = device.copy_rate {
        println!("copy on the device: {:.0} GB/s, read and write", rate / 1e9);
    }
    println!("\n{:<62}{:>11}{:>10}{:>10}{:>9}", "case", "ms", "TFLOP/s", "GB/s", "of copy");
    let mut results = Vec::new();
    for case in &selected {
        match measure(case, device, options.repeats) {
            Ok(result) => results.push(result),
            Err(e) if e.kind() == ErrorKind::Memory => println!("{:<62} skipped: {e}", case.name),
            Err(e) => return Err(format!("{}: {e}", case.name)),
        }
    }
    // Part of the cases must not replace a file of all.
    let whole = options.filters.is_empty() && !options.cpu;
    let path = options.json.clone().or(whole.then(|| default_file(device, options.scale)));
    let Some(path) = path else { return Ok(()) };
    let file = json!({
        "device": device.name,
        "driver": device.driver,
        "kernels": device.variant,
        "pyraflow": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
        "scale": options.scale.to_string(),
        "repeats": options.repeats,
        "copy_gbytes_per_second": device.copy_rate.map(|rate| rate / 1e9),
        "results": results,
    });
    println!("\nwritten to {}", path.display());
    std::fs::write(&path, format!("{file:#}\n"))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn run() -> Result<(), String> {
    let options = Options::parse(std::env::args().skip(1))?;
    if options.cpu {
        let cpu = Cpu::rounding_to_bf16();
        let name = cpu.description();
        let driver = "none".into();
        let device = Device { name, driver, variant: "CPU", backend: &cpu, copy_rate: None };
        return bench(&options, &device);
    }
    match gpu() {
        Ok(gpu) => bench(&options, &Device::of(&gpu, options.variant.as_deref())?),
        Err(reason) => {
            println!("GPU: skipped, {reason}");
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ops: {message}");
            ExitCode::FAILURE
        }
    }
}
