//! The protocols that come with Fieldline.

/// Name and source of every built-in protocol.
#[must_use]
pub fn built_in() -> &'static [(&'static str, &'static str)] {
    &[
        ("teltonika", include_str!("../../../protocols/teltonika/protocol.pvm")),
        ("wialon_ips", include_str!("../../../protocols/wialon_ips/protocol.pvm")),
    ]
}
