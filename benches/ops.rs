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
//!
//! On a GPU of compute capability 9.0, `-- linear --tile NAME --json FILE` has all linear layers
//! computed in one tile, and `--tile all` in the one that is chosen for each and in every other:
//! `tools/fit_tiles.py` fits the times to that which the choice goes by.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use pyraflow::cases::{Case, Gpu, Scale, cases, gpu};
use pyraflow::exec::cuda::LinearTile;
use pyraflow::exec::{Backend, Cpu};
use pyraflow::graph::Op;
use pyraflow::{ErrorKind, Result};
use serde_json::{Value, json};

struct Options {
    scale: Scale,
    repeats: usize,
    json: Option<PathBuf>,
    variant: Option<String>,
    /// Tiles of linear layers, one after another; `None` leaves the choice to the backend.
    tiles: Vec<Option<LinearTile>>,
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
            tiles: vec![None],
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
                "--tile" => options.tiles = tiles(&value()?)?,
                "--cpu" => options.cpu = true,
                // What cargo adds.
                "--bench" => {}
                _ if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
                _ => options.filters.push(arg),
            }
        }
        if options.forces_tiles() && (options.cpu || options.variant.is_some()) {
            return Err("--tile goes with neither --cpu nor --variant".into());
        }
        Ok(options)
    }

    fn forces_tiles(&self) -> bool {
        self.tiles.iter().any(Option::is_some)
    }
}

/// What `--tile` asks for: the tile that is chosen first, so that it need not be measured again.
fn tiles(name: &str) -> Result<Vec<Option<LinearTile>>, String> {
    match name {
        "all" => Ok([None].into_iter().chain(LinearTile::all().into_iter().map(Some)).collect()),
        _ => Ok(vec![Some(name.parse().map_err(|e| format!("--tile: {e}, or all"))?)]),
    }
}

/// What is timed.
struct Device<'a> {
    name: String,
    driver: String,
    variant: &'a str,
    multiprocessors: Option<u32>,
    /// Each with the tile of its linear layers, where that is forced.
    backends: Vec<(Option<LinearTile>, &'a dyn Backend)>,
    /// Bytes per second of a large copy.
    copy_rate: Option<f64>,
}

impl<'a> Device<'a> {
    fn of(gpu: &'a Gpu, options: &Options) -> Result<Device<'a>, String> {
        let variant = options.variant.as_deref();
        let names: Vec<_> = gpu.variants.iter().map(|v| v.name).collect();
        let found = gpu.variants.iter().find(|v| variant.is_none_or(|name| v.name == name));
        let found = found.ok_or(format!("no such --variant: {}", names.join(", ")))?;
        let backend = |&tile: &Option<LinearTile>| {
            let Some(tile) = tile else { return Some((None, &*found.plain)) };
            let forced = gpu.tiles.iter().find(|(of, _)| *of == tile);
            forced.map(|(tile, variant)| (Some(*tile), &*variant.plain))
        };
        let backends: Option<Vec<_>> = options.tiles.iter().map(backend).collect();
        Ok(Device {
            name: gpu.name.clone(),
            driver: gpu.driver.clone(),
            variant: found.name,
            multiprocessors: Some(gpu.multiprocessors),
            backends: backends.ok_or(format!("--tile: no kernels in tiles for {}", gpu.name))?,
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

/// Rows, columns and inner dimension of every linear layer of the case.
fn products(case: &Case, backend: &dyn Backend) -> Result<Vec<[usize; 3]>> {
    let mut products = Vec::new();
    for graph in case.record(backend.activations())? {
        for node in graph.nodes().iter().filter(|node| matches!(node.op, Op::Linear { .. })) {
            let [x, out] = [node.inputs[0], node.output].map(|id| graph.tensor(id));
            products.push([x.rows(), out.cols(), x.cols()]);
        }
    }
    Ok(products)
}

/// Prints a line of the table for every backend of the device that does not start the same kernels
/// as one before it, and returns them for the file.
fn measure(case: &Case, device: &Device<'_>, repeats: usize) -> Result<Vec<Value>> {
    let (mut seen, mut lines) = (HashSet::new(), Vec::new());
    let in_tiles = device.backends.iter().any(|(tile, _)| tile.is_some());
    for &(tile, backend) in &device.backends {
        let mut running = case.open(backend)?;
        let kernels = running.kernels()?;
        if seen.insert(kernels.clone()) {
            let mut line = measured(case, running.time(repeats)?, backend, device.copy_rate)?;
            if in_tiles {
                print!("   {}", kernels.join(" "));
                line["tile"] = json!(tile.map(|tile| tile.to_string()));
                line["kernels"] = json!(kernels);
                line["products"] = json!(products(case, backend)?);
            }
            println!();
            lines.push(line);
        }
    }
    Ok(lines)
}

/// Prints a line of the table, but for its end, and returns it.
fn measured(
    case: &Case,
    mut times: Vec<f64>,
    backend: &dyn Backend,
    copy_rate: Option<f64>,
) -> Result<Value> {
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let (flops, bytes) = case.work(backend.activations())?;
    let [flop_rate, byte_rate] = [flops, bytes].map(|n| n as f64 / seconds);
    let of_copy = copy_rate.map(|rate| byte_rate / rate);
    print!(
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
            Ok(lines) => results.extend(lines),
            Err(e) if e.kind() == ErrorKind::Memory => println!("{:<62} skipped: {e}", case.name),
            Err(e) => return Err(format!("{}: {e}", case.name)),
        }
    }
    // Part of the cases must not replace a file of all.
    let whole = options.filters.is_empty() && !options.cpu && !options.forces_tiles();
    let path = options.json.clone().or(whole.then(|| default_file(device, options.scale)));
    let Some(path) = path else { return Ok(()) };
    let mut file = json!({
        "device": device.name,
        "driver": device.driver,
        "kernels": device.variant,
        "multiprocessors": device.multiprocessors,
        "pyraflow": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
        "scale": options.scale.to_string(),
        "repeats": options.repeats,
        "copy_gbytes_per_second": device.copy_rate.map(|rate| rate / 1e9),
        "results": results,
    });
    if options.forces_tiles() {
        file["tiles"] = json!(LinearTile::kernels());
    }
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
        let backends: Vec<(_, &dyn Backend)> = vec![(None, &cpu)];
        let (variant, multiprocessors, copy_rate) = ("CPU", None, None);
        let device = Device { name, driver, variant, multiprocessors, backends, copy_rate };
        return bench(&options, &device);
    }
    match gpu() {
        Ok(gpu) => bench(&options, &Device::of(&gpu, &options)?),
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
