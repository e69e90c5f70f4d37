//! `top`: shows a live view of daemons.

use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::Args;

use super::output;
use crate::config::Settings;
use crate::error::{CommandError, OrFailed};
use crate::top::{self, Page, Source};

const AFTER_HELP: &str = "\
Reads only the admin ports and changes nothing; sends the token of admin.token_file to each. Each partition is one symbol: a dot is caught up, a bar grows
by one step per power of ten of lag in records, X is halted, ? is unknown. Database and Kafka time overlap, so
the shares may add up to more than 100 %. Quit with q, Esc or Ctrl-C.

Examples:
  payment-writer top
  payment-writer top --url http://10.0.0.1:9464 --url http://10.0.0.2:9464
  payment-writer top --once";

const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// `top`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct TopArgs {
    /// URL of a daemon's admin port; can be repeated. Default: from admin.listen
    #[arg(long = "url", value_name = "URL")]
    pub urls: Vec<String>,
    /// Refresh interval, 100ms to 1m
    #[arg(long, default_value = "1s", value_parser = interval)]
    pub interval: Duration,
    /// Print one page as text, from two samples one interval apart, and exit
    #[arg(long)]
    pub once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = super::duration(text)?;
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        Ok(interval)
    } else {
        Err("a duration from 100ms to 1m".to_owned())
    }
}

/// URL of the daemon with these settings on this machine.
pub(super) fn own_url(listen: SocketAddr) -> String {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, listen.port()))
}

/// Shows one page, or refreshes it until the user quits.
pub fn top(settings: &Settings, args: &TopArgs) -> Result<(), CommandError> {
    let urls = if args.urls.is_empty() { vec![own_url(settings.admin.listen)] } else { args.urls.clone() };
    let token = settings
        .admin
        .token_file
        .as_deref()
        .map(crate::config::read_token)
        .transpose()
        .map_err(CommandError::usage)?;
    let sources: Vec<Source> = urls.iter().map(|url| Source::new(url, token.clone())).collect();
    let first: Vec<_> = sources.iter().map(Source::fetch).collect();
    if let Some(Err(error)) = first.iter().find(|_| first.iter().all(Result::is_err)) {
        return Err(CommandError::failed(error.to_string()));
    }
    if args.once {
        std::thread::sleep(args.interval);
        let second: Vec<_> = sources.iter().map(Source::fetch).collect();
        let looks = sources.iter().zip(&first).zip(&second);
        let page = Page::of(looks.map(|((source, a), b)| (source.url.as_str(), a.as_ref().ok(), b)));
        return output::print(top::plain(&page));
    }
    if !std::io::stdout().is_terminal() {
        return Err(CommandError::usage("stdout is not a terminal; use --once to print a page"));
    }
    top::run(sources, first, args.interval).or_failed_to("cannot use the terminal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_listens_everywhere_is_asked_on_the_loopback() {
        for (listen, url) in [
            ("127.0.0.1:9464", "http://127.0.0.1:9464"),
            ("0.0.0.0:1", "http://127.0.0.1:1"),
            ("[::]:1", "http://[::1]:1"),
            ("10.1.2.3:4", "http://10.1.2.3:4"),
        ] {
            assert_eq!(own_url(listen.parse().unwrap()), url);
        }
    }
}
