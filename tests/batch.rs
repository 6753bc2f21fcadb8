//! A file of 1,000 prompts through a maker that only writes small files: stopped anywhere and
//! run again, nothing is lost and nothing made twice; shards together are the whole.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use pyraflow::batch::{
    Entry, Form, Job, Maker, Naming, Options, Record, Records, Shard, Status, Summary, jobs,
    read_lines, run,
};
use pyraflow::checkpoint::{Family, Variant};
use pyraflow::media::{Format, OutputTarget};
use pyraflow::pipeline::{Output, Request, SavedRun, Timings};
use pyraflow::{Error, ErrorKind, Result};
use serde_json::{Value, json};

const LINES: usize = 1000;

/// Every 50th line is bad, every 125th repeats the line before it.
fn prompts() -> String {
    let line = |i: usize| match i {
        _ if i % 50 == 49 => format!("{{\"prompt\": \"broken {i}\", \"sed\": 1}}"),
        _ if i % 125 == 124 => format!("{{\"prompt\": \"clip {}\", \"seed\": {}}}", i - 1, i - 1),
        _ if i % 7 == 3 => format!("{{\"prompt\": \"named {i}\", \"output\": \"n/{i}.y4m\"}}"),
        _ => format!("{{\"prompt\": \"clip {i}\", \"seed\": {i}}}"),
    };
    (0..LINES).map(|i| line(i) + "\n").collect()
}

fn entries() -> Vec<Entry> {
    let naming = Naming { format: Format::Mp4, model: json!("none") };
    jobs(&read_lines(prompts().as_bytes(), Form::Json), &naming, |line| {
        let prompt = line.prompt.as_deref().unwrap_or_default();
        let request = Request::published(Family::Sd3, Variant::P384, prompt, None);
        Ok((request, line.seed))
    })
}

/// Where a process dies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Accident {
    /// While the units are made.
    Before,
    /// When the output is complete and the end not yet recorded.
    After,
    /// In no way.
    None,
}

/// Writes the prompt instead of a video, and counts.
struct Writer {
    made: HashMap<String, usize>,
    resumed: usize,
    budget: usize,
    accident: Accident,
    fails: fn(&Job) -> bool,
}

impl Writer {
    fn new() -> Writer {
        Writer {
            made: HashMap::new(),
            resumed: 0,
            budget: usize::MAX,
            accident: Accident::None,
            fails: |_| false,
        }
    }

    fn saved(job: &Job, units: &Path) -> SavedRun {
        SavedRun::new(units, json!({ "key": job.key }))
    }
}

impl Maker for Writer {
    fn make(&mut self, job: &Job, output: &Output) -> Result<Timings> {
        if (self.fails)(job) {
            return Err(Error::numeric("NaN"));
        }
        let units = output.units.as_deref().expect("a folder");
        if self.budget == 0 && self.accident == Accident::Before {
            Self::saved(job, units).begin()?;
            return Err(Error::interrupted("killed"));
        }
        self.resumed += usize::from(output.resume);
        let OutputTarget::File { path, .. } = &output.target else { panic!("a file") };
        assert!(output.overwrite || !path.exists(), "{path:?} would be replaced unasked");
        if !output.resume {
            Self::saved(job, units).begin()?;
        }
        fs::write(path, &job.request.prompt).expect("written");
        if self.budget == 0 && self.accident == Accident::After {
            return Err(Error::interrupted("killed"));
        }
        self.budget -= 1;
        *self.made.entry(job.key.clone()).or_insert(0) += 1;
        Ok(Timings::default())
    }

    fn left(&self, job: &Job, units: &Path) -> bool {
        Self::saved(job, units).is_there()
    }

    fn settings(&self, job: &Job) -> Value {
        json!({ "prompt": job.request.prompt, "seed": job.request.seed })
    }
}

const KEEP_GOING: Options =
    Options { shard: Shard::WHOLE, keep_going: true, overwrite: false, keep_units: false };

fn once(folder: &Path, options: Options, writer: &mut Writer) -> (Summary, Result<()>) {
    let entries = entries();
    let mut records = Records::open(folder, &options.shard.records_name()).expect("records");
    run(&entries, folder, &mut records, options, writer, &mut |_| Ok(()))
}

/// All outputs with their contents.
fn outputs(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for dir in [folder.to_path_buf(), folder.join("n")] {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().expect("UTF-8");
            if entry.path().is_file() && !name.ends_with(".jsonl") {
                found.push((name, fs::read_to_string(entry.path()).expect("text")));
            } else {
                assert!(!name.ends_with(".units"), "{name} is left");
            }
        }
    }
    found.sort();
    found
}

/// All records of a folder.
fn records(folder: &Path) -> Vec<Record> {
    let files = fs::read_dir(folder).expect("a folder").flatten();
    let files = files.filter(|f| f.path().extension().is_some_and(|e| e == "jsonl"));
    let text: String = files.map(|f| fs::read_to_string(f.path()).expect("text")).collect();
    text.lines().map(|l| serde_json::from_str(l).expect("a record")).collect()
}

/// Every line is accounted for: one `done` for every job, one `bad` for every bad line.
fn check_complete(folder: &Path) {
    let mut done: HashMap<String, usize> = HashMap::new();
    let mut bad: HashMap<usize, usize> = HashMap::new();
    for record in records(folder) {
        match record.status {
            Status::Done => *done.entry(record.key).or_insert(0) += 1,
            Status::Bad => *bad.entry(record.line).or_insert(0) += 1,
            Status::Failed => {}
        }
    }
    let jobs: Vec<_> = entries()
        .into_iter()
        .filter_map(|e| if let Entry::Job(job) = e { Some(job) } else { None })
        .collect();
    assert_eq!((jobs.len(), bad.len()), (LINES - 20 - 4, 20));
    assert!(jobs.iter().all(|job| done.get(&job.key) == Some(&1)), "each job once");
    assert!(bad.values().all(|&times| times == 1), "each bad line once: {bad:?}");
    let outputs = outputs(folder);
    assert_eq!(outputs.len(), jobs.len());
    for job in &jobs {
        let path = folder.join(&job.output);
        assert_eq!(fs::read_to_string(path).expect("the output"), job.request.prompt);
    }
}

#[test]
fn a_thousand_prompts_survive_any_number_of_accidents() {
    let folder = tempfile::tempdir().expect("folder");
    let mut made = HashMap::new();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let accident = if attempts % 2 == 0 { Accident::After } else { Accident::Before };
        let mut writer = Writer { budget: 37, accident, ..Writer::new() };
        let (summary, result) = once(folder.path(), KEEP_GOING, &mut writer);
        for (key, times) in writer.made {
            *made.entry(key).or_insert(0) += times;
        }
        let Summary { done, there, failed, left, bad, duplicates, elsewhere } = summary;
        assert_eq!(done + there + failed + left + bad + duplicates + elsewhere, LINES);
        assert_eq!(writer.resumed, usize::from(attempts > 1), "what was interrupted is resumed");
        match result.expect_err("bad lines").kind() {
            ErrorKind::Interrupted => assert!(left > 0),
            kind => {
                assert_eq!((kind, left), (ErrorKind::Input, 0));
                break;
            }
        }
    }
    assert_eq!(attempts, (LINES - 24).div_ceil(37));
    assert_eq!(made.len(), LINES - 24);
    assert!(made.values().all(|&times| times == 1), "nothing is made twice");
    check_complete(folder.path());

    // Once more: nothing is to be done.
    let before = records(folder.path());
    let mut writer = Writer::new();
    let (summary, _) = once(folder.path(), KEEP_GOING, &mut writer);
    assert_eq!((summary.done, summary.there), (0, LINES - 24));
    assert!(writer.made.is_empty());
    assert_eq!(records(folder.path()), before);

    // A lost record file costs only the outputs with names of their own choice, which are not
    // replaced unasked; a lost output is made again.
    let one = entries().into_iter().find_map(|e| match e {
        Entry::Job(job) if job.own_name => Some(job),
        _ => None,
    });
    fs::remove_file(folder.path().join(one.expect("a job").output)).expect("removed");
    let (summary, _) = once(folder.path(), KEEP_GOING, &mut writer);
    assert_eq!((summary.done, writer.made.len()), (1, 1));
}

#[test]
fn shards_together_are_one_run() {
    let whole = tempfile::tempdir().expect("folder");
    let (_, result) = once(whole.path(), KEEP_GOING, &mut Writer::new());
    assert_eq!(result.expect_err("bad lines").kind(), ErrorKind::Input);
    let parts = tempfile::tempdir().expect("folder");
    let mut made = 0;
    for index in [1, 0] {
        let options = Options { shard: Shard { index, count: 2 }, ..KEEP_GOING };
        let mut writer = Writer::new();
        let (summary, _) = once(parts.path(), options, &mut writer);
        assert_eq!(summary.elsewhere, LINES / 2);
        made += writer.made.len();
    }
    assert_eq!(made, LINES - 24);
    check_complete(whole.path());
    check_complete(parts.path());
    assert_eq!(outputs(whole.path()), outputs(parts.path()));
    // Another division finds all of it done.
    for index in 0..3 {
        let options = Options { shard: Shard { index, count: 3 }, ..KEEP_GOING };
        let mut writer = Writer::new();
        once(parts.path(), options, &mut writer).1.expect_err("bad lines");
        assert!(writer.made.is_empty());
    }
}

#[test]
fn without_keep_going_bad_lines_stop_everything_and_failures_what_follows() {
    let folder = tempfile::tempdir().expect("folder");
    let options = Options { keep_going: false, ..KEEP_GOING };
    let mut writer = Writer::new();
    let (summary, result) = once(folder.path(), options, &mut writer);
    let error = result.expect_err("bad lines");
    assert!(error.to_string().starts_with("line 50: unknown field"), "{error}");
    assert_eq!((writer.made.len(), summary.bad, summary.left), (0, 20, LINES - 24));

    let mut writer = Writer { fails: |job| job.line == 5 || job.line == 7, ..Writer::new() };
    let (summary, result) = once(folder.path(), KEEP_GOING, &mut writer);
    assert_eq!(result.expect_err("the first").kind(), ErrorKind::Input);
    assert_eq!((summary.done, summary.failed), (LINES - 26, 2));
    let failed: Vec<_> =
        records(folder.path()).into_iter().filter(|r| r.status == Status::Failed).collect();
    assert_eq!(failed.iter().map(|r| r.line).collect::<Vec<_>>(), [5, 7]);
    assert_eq!(failed[0].error.as_deref(), Some("NaN"));
    // What failed is tried again.
    let (summary, _) = once(folder.path(), KEEP_GOING, &mut Writer::new());
    assert_eq!((summary.done, summary.failed, summary.there), (2, 0, LINES - 26));
    check_complete(folder.path());
}

#[test]
fn files_of_others_are_not_replaced_unasked() {
    let folder = tempfile::tempdir().expect("folder");
    fs::create_dir(folder.path().join("n")).expect("a folder");
    fs::write(folder.path().join("n/3.y4m"), "mine").expect("a file");
    let refusing = |options: Options| {
        struct Refusing(Writer);
        impl Maker for Refusing {
            fn make(&mut self, job: &Job, output: &Output) -> Result<Timings> {
                let OutputTarget::File { path, .. } = &output.target else { panic!("a file") };
                if path.exists() && !output.overwrite {
                    return Err(Error::usage("exists already"));
                }
                self.0.make(job, output)
            }
            fn left(&self, job: &Job, units: &Path) -> bool {
                self.0.left(job, units)
            }
            fn settings(&self, job: &Job) -> Value {
                self.0.settings(job)
            }
        }
        let entries = entries();
        let mut records = Records::open(folder.path(), "results").expect("records");
        let mut maker = Refusing(Writer::new());
        run(&entries, folder.path(), &mut records, options, &mut maker, &mut |_| Ok(())).0
    };
    assert_eq!(refusing(KEEP_GOING).failed, 1);
    assert_eq!(fs::read_to_string(folder.path().join("n/3.y4m")).expect("text"), "mine");
    let summary = refusing(Options { overwrite: true, ..KEEP_GOING });
    assert_eq!((summary.done, summary.failed), (1, 0));
    check_complete(folder.path());
}

#[test]
fn shards_are_read_and_checked() {
    assert_eq!("3/4".parse(), Ok(Shard { index: 3, count: 4 }));
    for wrong in ["4/4", "1", "0/0", "-1/4", "a/b", ""] {
        assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
    }
}
