//! How many connections come from one address.
//!
//! A connection takes a [`Place`] before anything is read from it, and its socket holds the place as long as it lives: through a TLS
//! handshake, as an HTTP connection and as the WebSocket that this becomes, which so counts once. Nothing here waits, and nothing is
//! remembered of an address without connections.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Addresses that begin with the same bits, written `192.0.2.0/24`, or as one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

/// Where an IPv4 address begins in an IPv6 address that stands for it.
const IPV4_AT_BITS: u8 = 96;

/// What is not a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// The address cannot be read.
    #[error("it is not an IP address with the bits that count, such as 192.0.2.0/24 or 2001:db8::/32")]
    Malformed,
    /// An IPv4 address written as IPv6, with fewer bits than make it one.
    #[error("of an IPv4 address in IPv6 at least 96 bits count; write it as IPv4, such as 192.0.2.0/24")]
    TooFewBits,
    /// More bits than an address has.
    #[error("an address has at most {max} bits")]
    TooManyBits {
        /// The bits of such an address.
        max: u8,
    },
}

impl Network {
    /// The machine itself.
    pub fn loopback() -> Vec<Self> {
        vec![
            Self { address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix_bits: 8 },
            Self { address: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix_bits: 128 },
        ]
    }

    /// Whether the address is one of them. An IPv4 address in IPv6 clothes is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differing = u32::from(own) ^ u32::from(other);
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differing = u128::from(own) ^ u128::from(other);
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NetworkError::Malformed)?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match bits {
            Some(bits) => bits.parse().map_err(|_| NetworkError::Malformed)?,
            None => max,
        };
        if prefix_bits > max {
            return Err(NetworkError::TooManyBits { max });
        }
        match address.to_canonical() {
            // In its own clothes, in which it is compared.
            IpAddr::V4(own) if address.is_ipv6() => {
                let prefix_bits = prefix_bits.checked_sub(IPV4_AT_BITS).ok_or(NetworkError::TooFewBits)?;
                Ok(Self { address: own.into(), prefix_bits })
            }
            _ => Ok(Self { address, prefix_bits }),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// Whom an address belongs to, as far as that can be told: of IPv6 whoever has one has its /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    V4(Ipv4Addr),
    V6Network(u64),
}

impl Origin {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments().map(u64::from);
                Self::V6Network(a << 48 | b << 32 | c << 16 | d)
            }
        }
    }
}

#[derive(Debug)]
struct Inner {
    /// Zero: no limit.
    connections_per_address: usize,
    uncounted: Vec<Network>,
    connections: Mutex<HashMap<Origin, usize>>,
}

/// Who may connect, by address. Clones count together.
#[derive(Clone, Debug)]
pub struct Admission {
    inner: Arc<Inner>,
}

/// There are as many connections from this address as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("limits.connections_per_address is reached")]
pub struct TooMany;

impl Admission {
    /// `connections_per_address` 0: no limit.
    pub fn new(connections_per_address: usize, uncounted: Vec<Network>) -> Self {
        Self { inner: Arc::new(Inner { connections_per_address, uncounted, connections: Mutex::default() }) }
    }

    /// A place for one more connection from there.
    ///
    /// # Errors
    /// There are too many.
    pub fn admit(&self, address: IpAddr) -> Result<Place, TooMany> {
        let max = self.inner.connections_per_address;
        if max == 0 || self.inner.uncounted.iter().any(|network| network.contains(address)) {
            return Ok(Place { counted: None });
        }
        let origin = Origin::of(address);
        let mut connections = self.inner.connections.lock();
        let count = connections.entry(origin).or_default();
        // One that is at the limit is there already: a refusal leaves no entry behind.
        if *count >= max {
            return Err(TooMany);
        }
        *count += 1;
        Ok(Place { counted: Some((Arc::clone(&self.inner), origin)) })
    }

    /// Addresses that have connections, of those that are counted.
    pub fn addresses(&self) -> usize {
        self.inner.connections.lock().len()
    }
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    counted: Option<(Arc<Inner>, Origin)>,
}

impl Place {
    /// The same byte stream, which has the place from now on.
    pub fn hold<T>(self, io: T) -> Placed<T> {
        Placed { io, _place: self }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((inner, origin)) = &self.counted else { return };
        let mut connections = inner.connections.lock();
        if let Some(count) = connections.get_mut(origin) {
            *count -= 1;
            if *count == 0 {
                connections.remove(origin);
            }
        }
    }
}

/// A byte stream with its place.
#[derive(Debug)]
pub struct Placed<T> {
    io: T,
    _place: Place,
}

impl<T: AsyncRead + Unpin> AsyncRead for Placed<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Placed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn network(text: &str) -> Network {
        text.parse().expect("a network")
    }

    #[test]
    fn networks_are_read_and_written() {
        for text in ["127.0.0.0/8", "::1/128", "0.0.0.0/0", "2001:db8::/33"] {
            assert_eq!(network(text).to_string(), text);
        }
        assert_eq!(network("192.0.2.7"), network("192.0.2.7/32"));
        assert_eq!(network("::1"), network("::1/128"));
        assert_eq!(network("::ffff:10.0.0.0/104"), network("10.0.0.0/8"));
        assert_eq!(network("::ffff:192.0.2.7"), network("192.0.2.7"));
        for (text, error) in [
            ("", NetworkError::Malformed),
            ("localhost", NetworkError::Malformed),
            ("10.0.0.0/", NetworkError::Malformed),
            ("10.0.0.0/-1", NetworkError::Malformed),
            ("10.0.0.0/8/8", NetworkError::Malformed),
            ("10.0.0.0/33", NetworkError::TooManyBits { max: 32 }),
            ("::ffff:10.0.0.0/95", NetworkError::TooFewBits),
            ("::/129", NetworkError::TooManyBits { max: 128 }),
        ] {
            assert_eq!(text.parse::<Network>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn a_network_contains_what_begins_alike() {
        let ten = network("10.1.0.0/16");
        assert!(ten.contains(address("10.1.255.255")) && ten.contains(address("::ffff:10.1.2.3")));
        assert!(!ten.contains(address("10.2.0.0")) && !ten.contains(address("::1")));
        assert!(network("0.0.0.0/0").contains(address("203.0.113.9")));
        assert!(!network("0.0.0.0/0").contains(address("2001:db8::1")));
        let odd = network("2001:db8:8000::/33");
        assert!(odd.contains(address("2001:db8:ffff::1")) && !odd.contains(address("2001:db8:7fff::1")));
    }

    #[test]
    fn places_are_counted_by_origin_and_come_back() {
        let admission = Admission::new(2, vec![network("10.0.0.0/8")]);
        let first = admission.admit(address("192.0.2.1")).expect("room");
        let second = admission.admit(address("::ffff:192.0.2.1")).expect("room");
        assert_eq!(admission.admit(address("192.0.2.1")).err(), Some(TooMany));
        assert!(admission.admit(address("192.0.2.2")).is_ok(), "another address has its own");
        let held = first.hold(tokio::io::empty());
        assert!(admission.admit(address("192.0.2.1")).is_err(), "a socket holds its place");
        drop(held);
        assert!(admission.admit(address("192.0.2.1")).is_ok());
        let many: Vec<_> = (0..9).map(|_| admission.admit(address("10.9.9.9")).expect("not counted")).collect();
        assert_eq!(admission.addresses(), 1);
        drop((second, many));
        assert_eq!(admission.addresses(), 0, "nothing is remembered");
    }

    #[test]
    fn of_ipv6_a_network_counts_as_one() {
        let admission = Admission::new(1, Vec::new());
        let _first = admission.admit(address("2001:db8:1:2::1")).expect("room");
        assert!(admission.admit(address("2001:db8:1:2:ffff::9")).is_err());
        assert!(admission.admit(address("2001:db8:1:3::1")).is_ok());
    }

    #[test]
    fn zero_is_no_limit() {
        let admission = Admission::new(0, Vec::new());
        let places: Vec<_> = (0..10).map(|_| admission.admit(address("192.0.2.1"))).collect();
        assert!(places.iter().all(Result::is_ok));
    }
}
