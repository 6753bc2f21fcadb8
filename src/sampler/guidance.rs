//! Classifier-free guidance and the Euler step that uses it.

/// Guidance that falls with every unit, in place of both constant scales:
/// `max(guidance - alpha * unit, min)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearGuidance {
    /// How much the scale falls per unit.
    pub alpha: f32,
    /// Where it stops falling.
    pub min: f32,
}

impl Default for LinearGuidance {
    /// The published setting.
    fn default() -> Self {
        LinearGuidance { alpha: 0.5, min: 2.0 }
    }
}

impl LinearGuidance {
    /// The scale at `unit`, from the scale at unit 0.
    pub fn at(&self, guidance: f32, unit: usize) -> f32 {
        (guidance - self.alpha * unit as f32).max(self.min)
    }
}

/// One Euler step along the guided velocity, in f32 and in place:
/// `v = negative + scale * (positive - negative)`, `x <- x + dsigma * v`.
/// Without `negative` (the velocity for the negative prompt and the scale), `v = positive`.
///
/// # Panics
/// If the lengths differ.
pub fn guided_euler_step(
    x: &mut [f32],
    positive: &[f32],
    negative: Option<(&[f32], f32)>,
    dsigma: f32,
) {
    assert_eq!(x.len(), positive.len());
    let Some((negative, scale)) = negative else {
        for (x, v) in x.iter_mut().zip(positive) {
            *x += dsigma * v;
        }
        return;
    };
    assert_eq!(x.len(), negative.len());
    for ((x, positive), negative) in x.iter_mut().zip(positive).zip(negative) {
        *x += dsigma * (negative + scale * (positive - negative));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_guidance_falls_to_its_minimum() {
        let published = LinearGuidance::default();
        let scales: Vec<_> = (0..13).map(|unit| published.at(7.0, unit)).collect();
        assert_eq!(scales[..4], [7.0, 6.5, 6.0, 5.5]);
        assert_eq!(scales[9..], [2.5, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn steps_follow_the_guided_velocity() {
        let mut x = [1.0, 2.0];
        guided_euler_step(&mut x, &[3.0, 5.0], Some((&[1.0, 4.0], 7.0)), -0.5);
        assert_eq!(x, [1.0 - 0.5 * 15.0, 2.0 - 0.5 * 11.0]);
        let mut x = [1.0, 2.0];
        guided_euler_step(&mut x, &[3.0, 5.0], None, -0.5);
        assert_eq!(x, [-0.5, -0.5]);
        // A scale of 0 is not "no guidance": it leaves the negative prompt alone.
        let mut x = [0.0];
        guided_euler_step(&mut x, &[3.0], Some((&[1.0], 0.0)), 1.0);
        assert_eq!(x, [1.0]);
    }
}
