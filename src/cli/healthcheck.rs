//! `healthcheck`: asks the daemon on this machine how it is, for container engines and images without an HTTP client.

use clap::Args;

use super::output;
use super::top::own_url;
use crate::config::Settings;
use crate::error::{CommandError, OrFailed};
use crate::top::Source;

const AFTER_HELP: &str = "\
Exit code 0: yes. 1: no, or no answer within 3 seconds. It asks at admin.listen, on the loopback if that is any address.

Examples:
  payment-writer healthcheck
  payment-writer healthcheck --ready";

/// `healthcheck`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct HealthcheckArgs {
    /// Ask whether the daemon is ready (/readyz) instead of whether it answers (/livez)
    #[arg(long)]
    pub ready: bool,
}

/// Prints the answer; fails unless it is 200.
pub fn healthcheck(settings: &Settings, args: &HealthcheckArgs) -> Result<(), CommandError> {
    let path = if args.ready { "/readyz" } else { "/livez" };
    let (code, text) = Source::new(&own_url(settings.admin.listen), None).probe(path).or_failed()?;
    match code {
        200 => output::print(text.trim_end()),
        code => Err(CommandError::failed(format!("{path}: {code}: {}", text.trim_end()))),
    }
}
