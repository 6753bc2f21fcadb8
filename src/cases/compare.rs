//! How far two results are apart.

/// The difference of a result from the oracle's.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// ‖found − expected‖ / ‖expected‖ over the elements that are NaN in neither; the
    /// numerator alone where all expected elements are zero.
    pub error: f64,
    /// The first element that is NaN in one and not in the other.
    pub nan_differs: Option<usize>,
    /// The element that is furthest off.
    pub worst: usize,
    /// How far it is off: what a single wrong element among millions shows in.
    pub largest: f64,
}

impl Comparison {
    /// Compares `found` with `expected`.
    ///
    /// # Panics
    /// If their lengths differ.
    pub fn new(found: &[f32], expected: &[f32]) -> Comparison {
        assert_eq!(found.len(), expected.len(), "number of elements");
        let mut nan_differs = None;
        let (mut difference, mut norm) = (0.0, 0.0);
        let (mut worst, mut largest) = (0, 0.0);
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            if found.is_nan() != expected.is_nan() {
                nan_differs.get_or_insert(i);
            }
            if found.is_nan() || expected.is_nan() {
                continue;
            }
            let distance = (f64::from(found) - f64::from(expected)).abs();
            if distance > largest {
                (worst, largest) = (i, distance);
            }
            difference += distance * distance;
            norm += f64::from(expected).powi(2);
        }
        let error = if norm > 0.0 { (difference / norm).sqrt() } else { difference.sqrt() };
        Comparison { error, nan_differs, worst, largest }
    }
}

#[cfg(test)]
mod tests {
    use super::Comparison;

    #[test]
    fn errors_are_relative_and_nan_is_told_apart() {
        let c = Comparison::new(&[3.0, 4.5], &[3.0, 4.0]);
        assert_eq!((c.error, c.worst, c.largest, c.nan_differs), (0.1, 1, 0.5, None));
        let c = Comparison::new(&[f32::NAN, 4.0], &[f32::NAN, 4.0]);
        assert_eq!((c.error, c.nan_differs), (0.0, None));
        assert_eq!(Comparison::new(&[1.0, f32::NAN], &[1.0, 4.0]).nan_differs, Some(1));
        assert_eq!(Comparison::new(&[1.0, 4.0], &[1.0, f32::NAN]).nan_differs, Some(1));
        assert_eq!(Comparison::new(&[0.5], &[0.0]).error, 0.5);
        assert!(Comparison::new(&[f32::INFINITY], &[1.0]).error.is_infinite());
    }
}
