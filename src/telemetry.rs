//! Observability: logs, metrics, traces, and the state shown by `/status`.

pub mod activity;
pub mod logging;
pub mod metrics;
pub mod status;
pub mod trace;
pub mod work;
