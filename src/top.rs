//! `top`: live view of daemons from their admin ports: rates, lag, phases, what is missing.

mod fetch;
mod page;
mod samples;
mod screen;

pub use fetch::Source;
pub use page::Page;
pub use screen::{plain, run};
