"""The AI mark of a file: IPTC's digital source type, in an XMP packet.

IPTC Photo Metadata Standard, `Iptc4xmpExt:DigitalSourceType`: the URI of a term that says how the
medium was made. `trainedAlgorithmicMedia` stands for the output of a trained model.
"""

import functools
from importlib.metadata import version
from typing import Final

SOFTWARE: Final = "generation-consumer"  # the distribution
DIGITAL_SOURCE_TYPE: Final = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
)
IPTC: Final = "iptc"  # name of this mark in the events

# Without padding: the packet is not meant to be edited in place (`end="r"`).
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>{software}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@functools.cache  # `version` reads files
def software() -> str:
    """Return the name and the version of this software."""
    return f"{SOFTWARE} {version(SOFTWARE)}"


@functools.cache
def xmp_packet() -> bytes:
    """Return the XMP packet of every marked file, in UTF-8."""
    return _PACKET.format(software=software(), source_type=DIGITAL_SOURCE_TYPE).encode()
