//! Every op on the GPU, held to what bf16 must cost.
//!
//! For each of [`pyraflow::cases`] the CPU in f32 is the oracle, and the CPU rounding to
//! bf16 wherever a device stores bf16 says how large an error is unavoidable: the GPU's
//! may be half as large again, that of a single element three times the CPU's largest, and
//! where rounding costs nothing the GPU must be exact. NaN must be where the oracle has it, two runs must agree to the bit, and a run among guard
//! zones with NaN in all memory must give the same bits and leave the guards whole. All of
//! it once for every set of kernels, and of linear layers once for every tile that they may have.
//!
//! Without a GPU the oracle is still checked: finite where it should be, and the cost of
//! bf16 no more than a few roundings.
//!
//! Options: `--scale small|test|bench`, `--json FILE`, `--require-gpu`, `--cases` (a line
//! for each case, which a GPU's run always prints), `--pretend` (the CPU rounding to bf16 is
//! taken for a GPU, to try this harness); names or parts of them select cases.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use pyraflow::cases::{Case, Comparison, Gpu, Output, Scale, Variant, cases, gpu};
use pyraflow::exec::{Backend, Cpu};
use pyraflow::{ErrorKind, Result};
use serde_json::json;

/// Times the error of bf16 on the CPU that the GPU's may be.
const ALLOWED: f64 = 1.5;
/// Times the largest error of an element on the CPU that the GPU's may be: the norm of
/// millions of elements does not show a single wrong one.
const ALLOWED_OF_ONE: f64 = 3.0;
/// A bf16 rounding costs 2⁻⁹; no case rounds often enough in a row to reach this.
const SANE: f64 = 3e-2;
/// The op whose kernels have tiles to choose from.
const LINEAR: &str = "linear";

struct Options {
    scale: Scale,
    json: Option<PathBuf>,
    filters: Vec<String>,
    skipped: Vec<String>,
    exact: bool,
    list: bool,
    lines: bool,
    ignored: bool,
    require_gpu: bool,
    pretend: bool,
    /// Variants that are left out.
    without: Vec<String>,
}

impl Options {
    /// Own options and those of libtest, so that `cargo test` can pass either.
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            scale: Scale::Test,
            json: None,
            filters: Vec::new(),
            skipped: Vec::new(),
            exact: false,
            list: false,
            lines: false,
            ignored: false,
            require_gpu: false,
            pretend: false,
            without: Vec::new(),
        };
        // `--name=value` is `--name value`.
        let mut args = args.flat_map(|arg| match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => vec![name.into(), value.into()],
            _ => vec![arg],
        });
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--scale" => options.scale = value()?.parse()?,
                "--json" => options.json = Some(value()?.into()),
                "--skip" => options.skipped.push(value()?),
                "--exact" => options.exact = true,
                "--list" => options.list = true,
                "--cases" | "--nocapture" | "--no-capture" => options.lines = true,
                "--require-gpu" => options.require_gpu = true,
                "--pretend" => options.pretend = true,
                "--without" => options.without.push(value()?),
                "--ignored" => options.ignored = true,
                "--include-ignored" | "--quiet" | "-q" | "--test" | "--show-output" => {}
                "--test-threads" | "--color" | "--format" | "--logfile" | "-Z" => {
                    value()?;
                }
                _ if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
                _ => options.filters.push(arg),
            }
        }
        Ok(options)
    }

    fn selects(&self, name: &str) -> bool {
        let matches = |pattern: &String| match self.exact {
            true => name == pattern,
            false => name.contains(pattern.as_str()),
        };
        let wanted = self.filters.is_empty() || self.filters.iter().any(matches);
        wanted && !self.skipped.iter().any(matches) && !self.ignored
    }
}

/// The error of one output.
struct Error {
    output: String,
    cpu: f64,
    /// The CPU's largest error of an element.
    largest: f64,
    /// For each set of kernels that ran; of tiles the largest.
    gpu: Vec<(&'static str, f64)>,
}

impl Error {
    fn add(&mut self, variant: &'static str, error: f64) {
        match self.gpu.iter_mut().find(|(name, _)| *name == variant) {
            // NaN stays.
            Some((_, largest)) if error.is_nan() || error > *largest => *largest = error,
            Some(_) => {}
            None => self.gpu.push((variant, error)),
        }
    }
}

/// What became of a case.
#[derive(Default)]
struct Report {
    errors: Vec<Error>,
    failures: Vec<String>,
    skipped: Option<String>,
    seconds: f64,
}

impl Report {
    /// The largest error of bf16 on the CPU.
    fn cpu(&self) -> f64 {
        self.errors.iter().map(|e| e.cpu).fold(0.0, f64::max)
    }

    /// The largest share of the CPU's error, if these kernels ran.
    fn ratio(&self, variant: &str) -> Option<f64> {
        let of = |e: &Error| {
            let (_, error) = e.gpu.iter().find(|(name, _)| *name == variant)?;
            // Where both are exact the share is none.
            Some(if *error == 0.0 { 0.0 } else { error / e.cpu })
        };
        self.errors.iter().filter_map(of).reduce(f64::max)
    }
}

fn position(index: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = index;
    let mut position: Vec<usize> = Vec::new();
    for extent in shape.iter().rev() {
        position.push(rest % extent);
        rest /= extent;
    }
    position.reverse();
    position
}

fn at(index: usize, found: &Output, expected: &Output) -> String {
    let place = position(index, &expected.shape);
    format!("at {place:?}: {:e}, expected {:e}", found.values[index], expected.values[index])
}

fn first_different_bits(a: &Output, b: &Output) -> Option<usize> {
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    a.values.iter().zip(&b.values).position(|pair| !same(pair))
}

/// NaN exceeds every bound.
fn exceeds(error: f64, bound: f64) -> bool {
    error.is_nan() || error > bound
}

/// Whether the oracle is finite where it should be.
fn check_oracle(case: &Case, oracle: &[Output], failures: &mut Vec<String>) {
    let values = || oracle.iter().flat_map(|output| &output.values);
    if values().any(|v| v.is_infinite()) {
        failures.push("the oracle is infinite somewhere".into());
    }
    let any_nan = values().any(|v| v.is_nan());
    if any_nan != case.has_nan {
        let is = if any_nan { "has" } else { "has no" };
        failures.push(format!("the oracle {is} NaN"));
    }
    if !values().any(|v| v.is_finite()) {
        failures.push("the oracle has nothing but NaN".into());
    }
}

fn judge(case: &Case, gpu: Option<&Gpu>, report: &mut Report) -> Result<()> {
    let oracle = case.open(&Cpu::new())?.run()?;
    check_oracle(case, &oracle, &mut report.failures);
    let rounding = case.open(&Cpu::rounding_to_bf16())?.run()?;
    for (found, expected) in rounding.iter().zip(&oracle) {
        let comparison = Comparison::new(&found.values, &expected.values);
        let (name, cpu, largest) = (&found.name, comparison.error, comparison.largest);
        if exceeds(cpu, SANE) {
            let worst = at(comparison.worst, found, expected);
            report.failures.push(format!("{name}: bf16 costs {cpu:.1e} on the CPU, {worst}"));
        }
        if let Some(i) = comparison.nan_differs {
            let place = at(i, found, expected);
            report.failures.push(format!("{name}: NaN differs in bf16 on the CPU {place}"));
        }
        report.errors.push(Error { output: name.clone(), cpu, largest, gpu: Vec::new() });
    }
    for variant in gpu.iter().flat_map(|gpu| &gpu.variants) {
        judge_variant(case, variant, variant.name, &oracle, report)?;
    }
    let tiles = gpu.iter().flat_map(|gpu| &gpu.tiles).filter(|_| case.op == LINEAR);
    for (tile, variant) in tiles {
        judge_variant(case, variant, &format!("tile {tile}"), &oracle, report)?;
    }
    Ok(())
}

fn judge_variant(
    case: &Case,
    variant: &Variant,
    kernels: &str,
    oracle: &[Output],
    report: &mut Report,
) -> Result<()> {
    let (first, second) = {
        let mut running = case.open(&*variant.plain)?;
        (running.run()?, running.run()?)
    };
    let fenced = match case.open(&*variant.fenced).and_then(|mut running| running.run()) {
        Ok(outputs) => Some(outputs),
        Err(e) if e.kind() == ErrorKind::Memory => return Err(e),
        Err(e) => {
            report.failures.push(format!("{kernels}, fenced: {e}"));
            None
        }
    };
    for (i, (found, expected)) in first.iter().zip(oracle).enumerate() {
        let name = &found.name;
        let comparison = Comparison::new(&found.values, &expected.values);
        let cpu = report.errors[i].cpu;
        let allowed = (ALLOWED * cpu).max(case.floor);
        report.errors[i].add(variant.name, comparison.error);
        if exceeds(comparison.error, allowed) {
            report.failures.push(format!(
                "{kernels}: {name} is off by {:.2e}, allowed {allowed:.2e}; worst {}",
                comparison.error,
                at(comparison.worst, found, expected)
            ));
        }
        let scale = expected.values.iter().fold(0f32, |most, v| most.max(v.abs()));
        let allowed =
            (ALLOWED_OF_ONE * report.errors[i].largest).max(case.floor * f64::from(scale));
        if exceeds(comparison.largest, allowed) {
            report.failures.push(format!(
                "{kernels}: an element of {name} is off by {:.2e}, allowed {allowed:.2e}, {}",
                comparison.largest,
                at(comparison.worst, found, expected)
            ));
        }
        if let Some(i) = comparison.nan_differs {
            let place = at(i, found, expected);
            report.failures.push(format!("{kernels}: {name} differs in NaN {place}"));
        }
        if let Some(i) = first_different_bits(&second[i], found) {
            let place = at(i, &second[i], found);
            report.failures.push(format!("{kernels}: the second run's {name} differs {place}"));
        }
        let fenced = fenced.as_ref().map(|outputs| &outputs[i]);
        if let Some((fenced, i)) = fenced.and_then(|f| Some((f, first_different_bits(f, found)?))) {
            let place = at(i, fenced, found);
            report.failures.push(format!("{kernels}: {name} differs among guards {place}"));
        }
    }
    Ok(())
}

fn report_on(case: &Case, gpu: Option<&Gpu>, scale: Scale) -> Report {
    let start = Instant::now();
    let mut report = Report::default();
    let result = catch_unwind(AssertUnwindSafe(|| judge(case, gpu, &mut report)));
    match result {
        Ok(Ok(())) => {}
        // Real shapes may be too large for a card; the others are not.
        Ok(Err(e)) if e.kind() == ErrorKind::Memory && scale == Scale::Bench => {
            report.skipped = Some(e.to_string())
        }
        Ok(Err(e)) => report.failures.push(e.to_string()),
        // The message has been printed.
        Err(_) => report.failures.push("panicked".into()),
    }
    report.seconds = start.elapsed().as_secs_f64();
    report
}

/// What a table's cell shows of a share.
fn share(ratio: Option<f64>) -> String {
    ratio.map_or("-".into(), |r| format!("{r:.2}"))
}

/// A table of cases, then of ops: the error of bf16 on the CPU, and the GPU's as multiples
/// of it.
struct Table {
    variants: Vec<&'static str>,
    lines: bool,
    ops: BTreeMap<&'static str, Row>,
}

#[derive(Default)]
struct Row {
    cases: usize,
    failed: usize,
    cpu: f64,
    ratios: Vec<Option<f64>>,
    seconds: f64,
}

impl Table {
    fn print_line(name: &str, cells: &[String]) {
        print!("{name:<58}");
        cells.iter().for_each(|cell| print!("{cell:>11}"));
        println!();
    }

    fn print_head(&self, name: &str, last: &str) {
        let mut cells = vec!["bf16 costs".to_string()];
        cells.extend(self.variants.iter().map(|v| format!("{v} /bf16")));
        cells.push(last.into());
        Table::print_line(name, &cells);
    }

    fn add(&mut self, case: &Case, report: &Report) {
        let ratios: Vec<_> = self.variants.iter().map(|v| report.ratio(v)).collect();
        let verdict = match (report.failures.is_empty(), &report.skipped) {
            (false, _) => "FAILED",
            (true, Some(_)) => "skipped",
            (true, None) => "ok",
        };
        if self.lines || verdict != "ok" {
            let mut cells = vec![format!("{:.1e}", report.cpu())];
            cells.extend(ratios.iter().map(|r| share(*r)));
            cells.push(verdict.into());
            Table::print_line(&case.name, &cells);
            report.failures.iter().chain(&report.skipped).for_each(|f| println!("    {f}"));
        }
        let row = self.ops.entry(case.op).or_default();
        row.cases += 1;
        row.failed += usize::from(!report.failures.is_empty());
        row.cpu = row.cpu.max(report.cpu());
        row.seconds += report.seconds;
        row.ratios.resize(ratios.len(), None);
        for (worst, ratio) in row.ratios.iter_mut().zip(ratios) {
            *worst = [*worst, ratio].into_iter().flatten().reduce(f64::max);
        }
    }

    fn print_ops(&self) {
        println!();
        self.print_head("worst of each op", "seconds");
        for (op, row) in &self.ops {
            let failed =
                if row.failed > 0 { format!(", {} FAILED", row.failed) } else { "".into() };
            let mut cells = vec![format!("{:.1e}", row.cpu)];
            cells.extend(row.ratios.iter().map(|r| share(*r)));
            cells.push(format!("{:.1}", row.seconds));
            Table::print_line(&format!("{op}, {} cases{failed}", row.cases), &cells);
        }
    }
}

fn as_json(case: &Case, report: &Report) -> serde_json::Value {
    let outputs: Vec<_> = report
        .errors
        .iter()
        .map(|e| {
            let gpu: serde_json::Map<_, _> = e
                .gpu
                .iter()
                .map(|(name, error)| {
                    // JSON has no infinity: a share of nothing is null.
                    ((*name).to_string(), json!({ "error": error, "ratio": error / e.cpu }))
                })
                .collect();
            json!({ "output": e.output, "cpu_bf16_error": e.cpu, "gpu": gpu })
        })
        .collect();
    json!({
        "op": case.op,
        "case": case.name,
        "shapes": case.shapes().unwrap_or_default(),
        "outputs": outputs,
        "failures": report.failures,
        "skipped": report.skipped,
    })
}

/// The CPU in a GPU's place; memory that the plan frees is poisoned and nothing is shared.
fn pretended() -> Gpu {
    let plain = Box::new(Cpu::rounding_to_bf16());
    let fenced = Box::new(Cpu::rounding_to_bf16().unshared().poisoning());
    Gpu {
        name: "none, the CPU pretends".into(),
        driver: "none".into(),
        variants: vec![Variant { name: "CPU", plain, fenced }],
        multiprocessors: 0,
        tiles: Vec::new(),
        copy_rate: Box::new(|| Err(pyraflow::Error::device("no device"))),
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("gpu_ops: {message}");
            return ExitCode::from(2);
        }
    };
    let all = cases(options.scale);
    let selected: Vec<_> = all.iter().filter(|c| options.selects(&c.name)).collect();
    if options.list {
        selected.iter().for_each(|case| println!("{}: test", case.name));
        println!("\n{} tests, 0 benchmarks", selected.len());
        return ExitCode::SUCCESS;
    }
    let mut gpu = if options.pretend { Ok(pretended()) } else { gpu() };
    if let Ok(gpu) = &mut gpu {
        let wanted = |variant: &Variant| !options.without.iter().any(|name| variant.name == name);
        gpu.variants.retain(wanted);
        gpu.tiles.retain(|(_, variant)| wanted(variant));
    }
    let (device, mut failed) = match &gpu {
        Ok(gpu) => (format!("{}, driver {}", gpu.name, gpu.driver), 0),
        Err(reason) => (format!("skipped, {reason}"), usize::from(options.require_gpu)),
    };
    println!("GPU: {device}\noracle: {}\n", Cpu::new().description());
    let mut variants: Vec<_> =
        gpu.iter().flat_map(|gpu| gpu.variants.iter().map(|v| v.name)).collect();
    variants.extend(gpu.iter().flat_map(|gpu| gpu.tiles.first()).map(|(_, v)| v.name));
    let lines = options.lines || gpu.is_ok();
    let mut table = Table { variants, lines, ops: BTreeMap::new() };
    if lines {
        table.print_head("case", "");
    }
    let (mut passed, mut skipped, mut results) = (0, 0, Vec::new());
    for case in &selected {
        let report = report_on(case, gpu.as_ref().ok(), options.scale);
        match (report.failures.is_empty(), &report.skipped) {
            (false, _) => failed += 1,
            (true, Some(_)) => skipped += 1,
            (true, None) => passed += 1,
        }
        table.add(case, &report);
        results.push(as_json(case, &report));
    }
    table.print_ops();
    if let Some(path) = &options.json {
        let file = json!({
            "pyraflow": env!("CARGO_PKG_VERSION"),
            "gpu": device,
            "scale": options.scale.to_string(),
            "allowed_ratio": ALLOWED,
            "results": results,
        });
        if let Err(e) = std::fs::write(path, format!("{file:#}\n")) {
            eprintln!("gpu_ops: cannot write {}: {e}", path.display());
            failed += 1;
        }
    }
    if let Err(reason) = &gpu {
        println!("\nGPU: skipped, {reason}");
    }
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    ExitCode::from(u8::from(failed > 0))
}
