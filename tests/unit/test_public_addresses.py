"""The addresses from which inputs may be fetched."""

import ipaddress

import pytest

from consumer.artifacts.web_inputs import is_public

# Sources: the IANA registries of special-purpose addresses, the RFCs named there, and what each
# cloud documents about its metadata service.
NOT_PUBLIC = [
    # RFC 6890 and the registry of IPv4
    "0.0.0.0",  # noqa: S104 - refused
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.1.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.9",  # PCP anycast, RFC 7723
    "192.0.0.10",  # TURN anycast, RFC 8155
    "192.0.0.170",  # discovery of NAT64, RFC 7050
    "192.0.2.1",
    "192.31.196.1",
    "192.52.193.1",
    "192.88.99.1",
    "192.168.1.1",
    "192.175.48.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    # metadata services and platforms of clouds
    "169.254.169.254",  # AWS, Azure, Google, OpenStack and others
    "169.254.170.2",  # credentials of AWS containers
    "169.254.0.23",  # Tencent
    "100.100.100.200",  # Alibaba
    "192.0.0.192",  # Oracle
    "168.63.129.16",  # Azure
    "fd00:ec2::254",  # AWS
    "fd20:ce::254",  # Google
    # RFC 4291 and the registry of IPv6
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c%eth0",  # a zone makes it local
    "febf::1",
    "fec0::1",  # site-local, deprecated by RFC 3879
    "feff::1",
    "fc00::1",
    "fd00::1",
    "ff02::1",
    "ff0e::1",
    "100::1",  # discard, RFC 6666
    "100:0:0:1::1",  # dummy prefix, RFC 9780
    "5f00::1",  # SRv6, RFC 9602
    "4000::1",  # not given out
    "2001:1::1",  # PCP anycast
    "2001:2::1",  # benchmarks, RFC 5180
    "2001:3::1",  # multicast tunnels
    "2001:4:112::1",  # AS112
    "2001:10::1",  # ORCHID, RFC 4843
    "2001:20::1",  # ORCHIDv2, RFC 7343
    "2001:30::1",  # DRIP, RFC 9374
    "2001:db8::1",
    "2620:4f:8000::1",  # AS112
    "3fff::1",  # documentation, RFC 9637
    # other ways to write or to reach an IPv4 address, private or public
    "::7f00:1",  # compatible, RFC 4291
    "::808:808",
    "::ffff:127.0.0.1",  # mapped
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",  # translated, RFC 2765
    "::ffff:0:8.8.8.8",
    "64:ff9b::7f00:1",  # NAT64, RFC 6052
    "64:ff9b::808:808",
    "64:ff9b:1::7f00:1",  # NAT64 of a network's own, RFC 8215
    "64:ff9b:1:ffff::1",
    "2002:7f00:1::",  # 6to4, RFC 3056
    "2002:808:808::1",
    "2001::1",  # Teredo, RFC 4380
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2606:2800:21f:cb07:0:5efe:7f00:1",  # ISATAP, RFC 5214
    "2606:2800:21f:cb07:200:5efe:808:808",
]

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "168.63.129.17",
    "172.15.255.255",
    "172.32.0.1",
    "192.0.1.1",
    "198.17.255.255",
    "223.255.255.254",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
    "2a00:1450:4001:82b::200e",
    "3ffe::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_non_public_address_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_accepted(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
