//! Sockets that several event loops listen on at once.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that wait to be accepted, for each event loop.
const BACKLOG: i32 = 4_096;
/// Datagrams are read one by one while their messages are stored in batches:
/// room for a burst of a second or so.
const UDP_BUFFER_BYTES: usize = 4 << 20;

/// One listener for each event loop.
#[derive(Debug)]
pub(crate) enum Listeners {
    Tcp(Vec<TcpListener>),
    Udp(Vec<UdpSocket>),
}

/// The address that `listen` names.
///
/// # Errors
///
/// If it is no address.
pub(crate) fn resolve(listen: &str) -> io::Result<SocketAddr> {
    let wrong = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let mut addresses = listen.to_socket_addrs().map_err(|error| {
        wrong(format!("`{listen}` is no address to listen on, such as 0.0.0.0:5027: {error}"))
    })?;
    addresses.next().ok_or_else(|| wrong(format!("`{listen}` names no address")))
}

/// Opens `count` sockets on `listen`, by another address of this machine if one is given; the kernel spreads
/// what comes over them.
///
/// # Errors
///
/// If the address is wrong, taken or not ours.
pub(crate) fn open(
    listen: &str,
    instead: Option<IpAddr>,
    udp: bool,
    count: usize,
) -> io::Result<(SocketAddr, Listeners)> {
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot listen on `{listen}`: {error}"))
    };
    let mut address = resolve(listen)?;
    address.set_ip(instead.unwrap_or(address.ip()));
    // Sharing a port would let a second Fieldline take half of our devices in
    // silence: whether it is taken shows only without sharing.
    let probe = socket(address, udp, false).map_err(named)?;
    address = local_address(&probe).map_err(named)?;
    drop(probe);
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        sockets.push(socket(address, udp, true).map_err(named)?);
    }
    let listeners = if udp {
        Listeners::Udp(sockets.into_iter().map(UdpSocket::from).collect())
    } else {
        Listeners::Tcp(sockets.into_iter().map(TcpListener::from).collect())
    };
    Ok((address, listeners))
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    let none = || io::Error::other("the socket has no internet address");
    socket.local_addr()?.as_socket().ok_or_else(none)
}

fn socket(address: SocketAddr, udp: bool, share: bool) -> io::Result<Socket> {
    let (kind, protocol) =
        if udp { (Type::DGRAM, Protocol::UDP) } else { (Type::STREAM, Protocol::TCP) };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if !udp {
        // Connections of an earlier run may still linger on the port.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    if share {
        socket.set_reuse_port(true)?;
    }
    if udp {
        // The kernel may grant less; that is no reason not to listen.
        socket.set_recv_buffer_size(UDP_BUFFER_BYTES).unwrap_or_default();
    }
    socket.bind(&address.into())?;
    if !udp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_listen_on_one_port_and_a_taken_one_is_told() {
        for udp in [false, true] {
            let (address, _sockets) = open("127.0.0.1:0", None, udp, 3).unwrap();
            assert_ne!(address.port(), 0);
            let taken = open(&address.to_string(), None, udp, 1).unwrap_err();
            assert_eq!(taken.kind(), io::ErrorKind::AddrInUse, "{taken}");
            assert!(taken.to_string().contains(&address.to_string()), "{taken}");
        }
        assert!(open("nowhere", None, false, 1).is_err());
        let other = "127.0.0.2".parse().ok();
        let (address, _sockets) = open("127.0.0.1:0", other, false, 1).unwrap();
        assert_eq!(Some(address.ip()), other);
    }
}
