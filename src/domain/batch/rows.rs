//! Rows of the tables in binary COPY format.

use bytes::Bytes;
use uuid::Uuid;

use super::Claim;
use crate::domain::columns::RowWriter;
use crate::domain::payment::Payment;
use crate::domain::record::RecordView;

/// Rows of one table in binary COPY format, without header and trailer.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The encoded rows.
    pub bytes: Bytes,
    /// Number of rows.
    pub count: usize,
}

/// The rows of the written payments, by table.
#[derive(Clone, Debug, Default)]
pub struct TableRows {
    /// `payment_core`
    pub core: Rows,
    /// `payment_metadata`
    pub metadata: Rows,
    /// `payment_notes`
    pub notes: Rows,
}

impl Claim {
    /// Bytes of one encoded row: six columns with their lengths.
    pub const ROW_BYTES: usize = 74;

    /// Appends the `idempotency` row in binary COPY format, with the columns (message_id, source_offset,
    /// payload_hash, created_at, source_partition, date). `today` is the UTC date of the claim, in days since
    /// 2000-01-01.
    pub fn write_row(&self, today: i32, out: &mut Vec<u8>) {
        RowWriter::start(out, 6)
            .uuid(&self.message_id)
            .bigint(self.offset.0)
            .bigint(self.payload_hash)
            .timestamptz(self.timestamp)
            .integer(self.partition.0)
            .date(today);
    }
}

/// Appends a payment's `payment_core` row in binary COPY format. `id` is [`Payment::payment_id`].
pub fn write_core_row(payment: &Payment<'_>, id: Uuid, out: &mut Vec<u8>) {
    RowWriter::start(out, 7)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .bigint(payment.cust_id)
        .numeric_millionths(payment.amount.millionths())
        .text(Some(payment.currency.code()))
        .smallint(payment.status.code())
        .text(Some(&payment.payment_type));
}

/// Appends a payment's `payment_metadata` row, with the partition and offset of its record.
pub fn write_metadata_row(payment: &Payment<'_>, id: Uuid, record: &RecordView<'_>, out: &mut Vec<u8>) {
    RowWriter::start(out, 7)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .timestamptz(payment.created_at)
        .integer(1)
        .uuid(payment.message_id.as_bytes())
        .integer(record.partition.0)
        .bigint(record.offset.0);
}

/// Appends a payment's `payment_notes` row. Call it only if the payment has a reference or a comment.
pub fn write_notes_row(payment: &Payment<'_>, id: Uuid, out: &mut Vec<u8>) {
    RowWriter::start(out, 4)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .text(payment.external_ref_id.as_deref())
        .text(payment.comment.as_deref());
}
