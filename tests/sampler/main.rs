//! The sampling loop with a small analytic model in place of the transformer, against a
//! reference written straight from the description of the algorithm: f64, channels first,
//! everything recomputed at every stage, schedules from the recorded file.

mod reference;

use std::cell::Cell;

use pyraflow::sampler::{
    Latent, LatentShape, LinearGuidance, Mode, NoiseSource, Observer, PhiloxNoise, RecordedNoise,
    Rounding, SamplerRequest, Silent, StageGeometry, sample,
};
use pyraflow::{Error, ErrorKind, Result};
use reference::{Analytic, frames_of, latent_of, reference};

/// How far an f32 run may be from the f64 reference, relative.
const TOLERANCE: f64 = 2e-6;

fn request(mode: Mode) -> SamplerRequest {
    SamplerRequest {
        mode,
        units: 5,
        height: 8,
        width: 16,
        steps: [4, 2, 1],
        video_steps: [2, 1, 4],
        guidance: 3.0,
        video_guidance: 2.0,
        linear_guidance: None,
        rounding: Rounding::default(),
    }
}

fn image() -> Latent {
    PhiloxNoise { seed: 99 }.posterior(LatentShape::frame(8, 16)).unwrap()
}

/// The finished units to start `mode` with.
fn beginning(mode: Mode) -> Vec<Latent> {
    match mode {
        Mode::TextToVideo => Vec::new(),
        Mode::ImageToVideo => vec![image()],
    }
}

/// What [`PhiloxNoise`] gives, as a recording.
fn record(request: &SamplerRequest, seed: u64) -> RecordedNoise {
    let mut source = PhiloxNoise { seed };
    let full = request.unit_shape();
    let half = LatentShape::frame(full.height / 2, full.width / 2);
    let first_unit = usize::from(request.mode == Mode::ImageToVideo);
    let initial =
        (0..request.units).map(|frame| source.initial(frame, full).unwrap().into_latent());
    let initial: Vec<_> = initial.collect();
    let mut blocks = Vec::new();
    for unit in first_unit..request.units {
        for (stage, shape) in [(1, half), (2, full)] {
            blocks.push(source.block(unit, stage, shape).unwrap().into_latent());
        }
    }
    RecordedNoise { initial: Latent::concat(&initial), blocks, first_unit, posterior: None }
}

fn run(request: &SamplerRequest, finished: Vec<Latent>, seed: u64) -> Vec<Latent> {
    let mut model = Analytic { bf16: request.rounding.latents, ..Analytic::default() };
    sample(request, finished, &mut model, &mut PhiloxNoise { seed }, &mut Silent).unwrap()
}

fn relative_error(a: &Latent, b: &Latent) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let square = |v: f64| v * v;
    let pairs = a.data().iter().zip(b.data()).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let (difference, norm) =
        pairs.fold((0.0, 0.0), |(d, n), (a, b)| (d + square(a - b), n + square(b)));
    (difference / norm).sqrt()
}

#[test]
fn runs_equal_the_reference() {
    let plain = |mode| request(mode);
    let linear = |mode| SamplerRequest {
        linear_guidance: Some(LinearGuidance { alpha: 0.75, min: 1.25 }),
        ..request(mode)
    };
    let unguided = |mode| SamplerRequest { guidance: 0.0, ..request(mode) };
    let image_only = SamplerRequest { units: 1, ..request(Mode::TextToVideo) };
    let mut requests = vec![image_only];
    for mode in [Mode::TextToVideo, Mode::ImageToVideo] {
        requests.extend([plain(mode), linear(mode), unguided(mode)]);
    }
    for request in requests {
        let mut noise = record(&request, 17);
        let finished = beginning(request.mode);
        let start = finished.first().map(|latent| frames_of(latent).remove(0));
        let expected = reference(&request, start.as_ref(), &noise);
        let mut model = Analytic::default();
        let result = sample(&request, finished, &mut model, &mut noise, &mut Silent).unwrap();
        assert_eq!(result.len(), request.units);
        assert_eq!(model.expected, None, "nothing comes after the last stage");
        for (unit, (latent, expected)) in result.iter().zip(&expected).enumerate() {
            let error = relative_error(latent, &latent_of(std::slice::from_ref(expected)));
            assert!(error < TOLERANCE, "{request:?}: unit {unit} is off by {error:e}");
        }
    }
}

/// The model is sensitive to what the test above is meant to check: each setting matters, and
/// so does the history, which is all that a change of unit 0 can act through.
#[test]
fn every_setting_changes_the_result() {
    let all = |request: &SamplerRequest, finished, seed| {
        Latent::concat(&run(request, finished, seed)[1..])
    };
    let video = request(Mode::TextToVideo);
    let base = all(&video, Vec::new(), 1);
    let edits: [fn(&mut SamplerRequest); 4] = [
        |r| r.guidance = 4.0,
        |r| r.video_steps[1] = 2,
        |r| r.video_guidance = 3.0,
        |r| r.linear_guidance = Some(LinearGuidance { alpha: 0.5, min: 1.0 }),
    ];
    for (i, edit) in edits.iter().enumerate() {
        let mut request = video.clone();
        edit(&mut request);
        let error = relative_error(&all(&request, Vec::new(), 1), &base);
        assert!(error > 50.0 * TOLERANCE, "edit {i}: {error:e}");
    }
    assert!(relative_error(&all(&video, Vec::new(), 2), &base) > 0.1);
    let from_image = relative_error(&all(&video, vec![image()], 1), &base);
    assert!(from_image > 50.0 * TOLERANCE, "history: {from_image:e}");
}

#[test]
fn resumed_and_extended_runs_have_the_same_bits() {
    for mode in [Mode::TextToVideo, Mode::ImageToVideo] {
        for rounding in [Rounding::default(), Rounding::PUBLISHED_BF16] {
            let request = SamplerRequest { rounding, ..request(mode) };
            let mut beginning = beginning(mode);
            if rounding.latents {
                beginning.iter_mut().for_each(Latent::round_to_bf16);
            }
            let whole = run(&request, beginning.clone(), 3);
            for units in beginning.len()..=request.units {
                assert_eq!(run(&request, whole[..units].to_vec(), 3), whole, "{units} given");
            }
            let shorter = SamplerRequest { units: 3, ..request };
            assert_eq!(run(&shorter, beginning, 3), whole[..3]);
        }
    }
}

/// That everything the model sees is rounded, [`Analytic`] checks at every call.
#[test]
fn bf16_runs_round_latents_and_timesteps() {
    let request =
        SamplerRequest { rounding: Rounding::PUBLISHED_BF16, ..request(Mode::TextToVideo) };
    let mut model = Analytic { bf16: true, ..Analytic::default() };
    let noise = &mut PhiloxNoise { seed: 4 };
    let rounded = sample(&request, Vec::new(), &mut model, noise, &mut Silent).unwrap();
    // Of 1000, 914.752, 829.504 and 744.256, as the schedule has them.
    let first: Vec<f32> = model.calls[..4].iter().map(|(_, _, step)| step.timestep).collect();
    assert_eq!(first, [1000.0, 916.0, 828.0, 744.0]);
    let exact = SamplerRequest { rounding: Rounding::default(), ..request };
    let error = relative_error(&rounded[0], &run(&exact, Vec::new(), 4)[0]);
    assert!((1e-4..2e-2).contains(&error), "{error:e}");
}

#[derive(Default)]
struct Recorder {
    events: Vec<String>,
    units: Vec<Latent>,
    steps: Cell<usize>,
    cancel_after: Option<usize>,
    refuse_unit: Option<usize>,
    stages: bool,
}

impl Observer for Recorder {
    fn step_finished(&mut self, stage: &StageGeometry, done: usize) -> Result<()> {
        self.steps.set(self.steps.get() + 1);
        self.events.push(format!(
            "{}.{} {done}/{}",
            stage.unit,
            stage.stage,
            stage.timesteps.len()
        ));
        Ok(())
    }

    fn wants_stages(&self) -> bool {
        self.stages
    }

    fn stage_finished(&mut self, stage: &StageGeometry, latent: &Latent) -> Result<()> {
        assert_eq!(latent.shape(), stage.shape);
        self.events.push(format!("{}.{} done", stage.unit, stage.stage));
        Ok(())
    }

    fn unit_finished(&mut self, unit: usize, latent: &Latent) -> Result<()> {
        self.events.push(format!("{unit} done"));
        self.units.push(latent.clone());
        match self.refuse_unit {
            Some(refused) if refused == unit => Err(Error::new(ErrorKind::Io, "disk full")),
            _ => Ok(()),
        }
    }

    fn cancelled(&self) -> bool {
        self.cancel_after.is_some_and(|steps| self.steps.get() >= steps)
    }
}

fn observe(
    request: &SamplerRequest,
    mut model: Analytic,
    recorder: &mut Recorder,
) -> Result<Vec<Latent>> {
    let finished = beginning(request.mode);
    sample(request, finished, &mut model, &mut PhiloxNoise { seed: 6 }, recorder)
}

#[test]
fn the_observer_sees_everything_in_order() {
    let request = SamplerRequest {
        units: 2,
        steps: [2, 1, 1],
        video_steps: [1, 1, 1],
        ..request(Mode::TextToVideo)
    };
    let mut recorder = Recorder { stages: true, ..Recorder::default() };
    let latents = observe(&request, Analytic::default(), &mut recorder).unwrap();
    assert_eq!(recorder.units, latents);
    let expected = [
        "0.0 1/2", "0.0 2/2", "0.0 done", "0.1 1/1", "0.1 done", "0.2 1/1", "0.2 done", "0 done",
        "1.0 1/1", "1.0 done", "1.1 1/1", "1.1 done", "1.2 1/1", "1.2 done", "1 done",
    ];
    assert_eq!(recorder.events, expected);
}

#[test]
fn cancelling_stops_before_the_next_step_and_loses_no_unit() {
    let request = request(Mode::TextToVideo);
    let whole = observe(&request, Analytic::default(), &mut Recorder::default()).unwrap();
    let per_unit: usize = request.steps.iter().sum();
    assert_eq!(per_unit, request.video_steps.iter().sum::<usize>());
    let total = request.units * per_unit;
    for stop in 0..total {
        let mut recorder = Recorder { cancel_after: Some(stop), ..Recorder::default() };
        let error = observe(&request, Analytic::default(), &mut recorder).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        assert_eq!(recorder.steps.get(), stop);
        let finished = stop / per_unit;
        assert!(error.to_string().ends_with(&format!("{finished} of 5 units are finished")));
        assert_eq!(recorder.units, whole[..finished]);
    }
    // Too late to stop: nothing is left to do.
    let mut recorder = Recorder { cancel_after: Some(total), ..Recorder::default() };
    assert_eq!(observe(&request, Analytic::default(), &mut recorder).unwrap(), whole);
}

/// Asking for it waits for a device.
#[test]
fn the_latent_is_asked_for_once_a_unit_unless_stages_are_wanted() {
    let request = request(Mode::ImageToVideo);
    let last = (1..request.units).map(|unit| (unit, 2));
    let every = (1..request.units).flat_map(|unit| (0..3).map(move |stage| (unit, stage)));
    let mut found = Vec::new();
    for (stages, expected) in [(false, last.collect::<Vec<_>>()), (true, every.collect())] {
        let mut recorder = Recorder { stages, ..Recorder::default() };
        let (mut model, noise) = (Analytic::default(), &mut PhiloxNoise { seed: 6 });
        let latents = sample(&request, vec![image()], &mut model, noise, &mut recorder).unwrap();
        assert_eq!(model.asked, expected);
        let seen = recorder.events.iter().filter(|e| e.contains('.') && e.ends_with("done"));
        assert_eq!(seen.count(), if stages { expected.len() } else { 0 });
        found.push(latents);
    }
    assert_eq!(found[0], found[1]);
}

#[test]
fn nan_and_infinity_of_any_stage_stop_the_run_at_its_unit() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (stage, stages) in (0..3).flat_map(|stage| [(stage, false), (stage, true)]) {
            let model = Analytic { poison: Some((2, stage, value)), ..Analytic::default() };
            let mut recorder = Recorder { stages, ..Recorder::default() };
            let error = observe(&request(Mode::ImageToVideo), model, &mut recorder).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Numeric);
            let place = if stages { format!("unit 2, stage {stage}") } else { "unit 2".into() };
            assert_eq!(error.to_string(), format!("{place}: the latent holds NaN or infinity"));
            assert_eq!(recorder.units.len(), 1);
        }
    }
}

#[test]
fn errors_of_the_parts_end_the_run() {
    let request = request(Mode::TextToVideo);
    let mut recorder = Recorder { refuse_unit: Some(1), ..Recorder::default() };
    let error = observe(&request, Analytic::default(), &mut recorder).unwrap_err();
    assert_eq!((error.kind(), recorder.units.len()), (ErrorKind::Io, 2));

    let mut noise = record(&request, 1);
    noise.blocks.truncate(3);
    let model = &mut Analytic::default();
    let error = sample(&request, Vec::new(), model, &mut noise, &mut Silent).unwrap_err();
    let expected = "unit 1, stage 2: the recording has no block noise of unit 1, stage 2";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn unusable_finished_units_are_refused() {
    let refusal = |request: &SamplerRequest, finished: Vec<Latent>| {
        let noise = &mut PhiloxNoise { seed: 0 };
        let error = sample(request, finished, &mut Analytic::default(), noise, &mut Silent);
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        error.to_string()
    };
    let request = request(Mode::ImageToVideo);
    assert!(refusal(&request, Vec::new()).contains("needs the image"));
    assert!(refusal(&request, vec![image(); 6]).contains("6 units are finished already"));
    let small = Latent::zeros(LatentShape::frame(8, 8));
    assert!(refusal(&request, vec![image(), small]).starts_with("unit 1: "));
    let mut nan = image();
    nan.data_mut()[0] = f32::INFINITY;
    assert!(refusal(&request, vec![nan]).contains("unit 0 holds NaN"));
    let none = SamplerRequest { units: 0, ..request };
    assert!(refusal(&none, vec![image()]).contains("0 latent frames"));
}
