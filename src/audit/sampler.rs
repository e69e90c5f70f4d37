//! Chooses random blocks of offsets. Pure, given its random numbers.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Chooses each block independently with the same probability. The cost depends on the number of chosen
/// blocks, not on the number of all blocks.
#[derive(Debug)]
pub struct Sampler {
    share: f64,
    /// Blocks to skip before the next chosen one.
    skip: u64,
    random: ChaCha8Rng,
}

impl Sampler {
    /// Chooses this share of the blocks, 0 to 1.
    pub fn new(share: f64, seed: u64) -> Self {
        let mut sampler = Self { share, skip: 0, random: ChaCha8Rng::seed_from_u64(seed) };
        sampler.skip = sampler.draw();
        sampler
    }

    /// Number of failures before a success of probability `share`, geometrically distributed.
    fn draw(&mut self) -> u64 {
        if self.share <= 0.0 {
            return u64::MAX;
        }
        // Greater than 0, so that the logarithm is finite.
        let uniform = 1.0 - self.random.random::<f64>();
        let skip = uniform.ln() / (1.0 - self.share).ln();
        // For a share of 1 the divisor is -infinity and the quotient 0. The conversion saturates.
        skip.floor().max(0.0) as u64
    }

    /// Indexes of the chosen blocks among the next `count`.
    pub fn choose(&mut self, count: u64) -> Vec<u64> {
        let mut chosen = Vec::new();
        let mut at = 0;
        while self.skip < count - at {
            at += self.skip;
            chosen.push(at);
            at += 1;
            self.skip = self.draw();
        }
        self.skip = self.skip.saturating_sub(count - at);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_none_are_chosen_at_the_ends_of_the_scale() {
        assert_eq!(Sampler::new(1.0, 1).choose(4), [0, 1, 2, 3]);
        assert!(Sampler::new(0.0, 1).choose(1_000_000).is_empty());
        assert!(Sampler::new(0.5, 1).choose(0).is_empty());
    }

    #[test]
    fn about_the_share_is_chosen_whatever_the_size_of_the_steps() {
        for (share, step) in [(0.001, 7), (0.001, 100_000), (0.01, 1), (0.3, 11)] {
            let mut sampler = Sampler::new(share, 42);
            let blocks = 1_000_000_u64;
            let chosen: usize = (0..blocks / step).map(|_| sampler.choose(step).len()).sum();
            let expected = share * blocks as f64;
            // Six standard deviations.
            let slack = 6.0 * (expected * (1.0 - share)).sqrt();
            assert!((chosen as f64 - expected).abs() < slack, "{share}: {chosen} of {blocks}");
        }
    }

    #[test]
    fn places_are_within_the_step_in_order_and_each_once() {
        let mut sampler = Sampler::new(0.4, 7);
        for count in 0..50 {
            let chosen = sampler.choose(count);
            assert!(chosen.iter().all(|place| *place < count));
            assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
