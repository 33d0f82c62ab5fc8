/* Decoding only the part of a JPEG that a crop needs, with libjpeg-turbo, and recoding JPEGs so that this is cheap.
 *
 * Rows above the box skip the inverse transform, rows below it are not read, and columns beside it are left out; the
 * pixels inside are those of a whole decode, to the bit. A JPEG whose MCU rows are cut into restart segments is decoded
 * from the segments that the box touches: nothing else is Huffman-decoded. The box is then resampled, with the pixels of
 * crop.py. Compiled on first use by data/images/jpeg.py.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

#define MARGIN 2 /* pixels around the box that chroma upsampling looks at */
#define ROWS 4 /* a call */
#define LOOK 10 /* bits with which a Huffman table is entered */
#define TAIL 4096 /* zero bytes after the segments: more than damage can make one MCU of 10 blocks read */

struct failure {
  struct jpeg_error_mgr manager;
  jmp_buf jump;
};

static void leave(j_common_ptr common) { longjmp(((struct failure *)common->err)->jump, 1); }

static void count_only(j_common_ptr common, int level) {
  if (level < 0) common->err->num_warnings++;
}

static void begin(struct jpeg_decompress_struct *jpeg, const unsigned char *data, uint64_t size) {
  jpeg_create_decompress(jpeg);
  jpeg_mem_src(jpeg, data, size);
  jpeg_read_header(jpeg, TRUE);
}

static void prepare(struct jpeg_decompress_struct *jpeg, struct failure *failure) {
  jpeg->err = jpeg_std_error(&failure->manager);
  failure->manager.error_exit = leave;
  failure->manager.emit_message = count_only;
}

/* height * 65536 + width of a JPEG, or -1. */
int64_t sam_repro_jpeg_sides(const unsigned char *data, uint64_t size) {
  struct jpeg_decompress_struct jpeg;
  struct failure failure;
  prepare(&jpeg, &failure);
  if (setjmp(failure.jump)) {
    jpeg_destroy_decompress(&jpeg);
    return -1;
  }
  begin(&jpeg, data, size);
  int64_t sides = (int64_t)jpeg.image_height * 65536 + jpeg.image_width;
  jpeg_destroy_decompress(&jpeg);
  return sides;
}

/* Where the parts of a sequential JPEG of one scan lie. */
struct layout {
  uint64_t sides, scan; /* bytes at which the height and the entropy-coded data begin */
  int64_t height, width, mcu_height, mcu_width; /* pixels */
  int64_t down, across, interval; /* MCUs: of the image, and of a restart segment */
};

static int64_t two_bytes(const unsigned char *at) { return at[0] << 8 | at[1]; }

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/* Read a frame header of `length` bytes. */
static int read_frame(const unsigned char *frame, int64_t length, struct layout *layout, int *components) {
  if (length < 8 || frame[2] != 8 || length != 8 + 3 * (*components = frame[7])) return 0;
  layout->height = two_bytes(frame + 3);
  layout->width = two_bytes(frame + 5);
  layout->mcu_height = layout->mcu_width = 8;
  for (int c = 0; c < *components && *components > 1; c++) {
    int64_t w = 8 * (frame[9 + 3 * c] >> 4), h = 8 * (frame[9 + 3 * c] & 15);
    if (w > layout->mcu_width) layout->mcu_width = w;
    if (h > layout->mcu_height) layout->mcu_height = h;
  }
  layout->down = parts(layout->height, layout->mcu_height);
  layout->across = parts(layout->width, layout->mcu_width);
  return layout->height > 0 && layout->width > 0;
}

/* Whether the JPEG's MCU rows are whole numbers of restart segments; fills the layout. */
static int read_layout(const unsigned char *data, uint64_t size, struct layout *layout) {
  int components = 0;
  memset(layout, 0, sizeof *layout);
  for (uint64_t at = 2; at + 4 <= size && data[at] == 0xFF;) {
    unsigned char marker = data[at + 1];
    int64_t length = two_bytes(data + at + 2);
    if (length < 3 || at + 2 + length > size || marker < 0xC0) return 0;
    if (marker == 0xC0 || marker == 0xC1) {
      if (components || !read_frame(data + at + 2, length, layout, &components)) return 0;
      layout->sides = at + 5;
    } else if (marker == 0xDD) {
      if (length != 4) return 0;
      layout->interval = two_bytes(data + at + 4);
    } else if (marker == 0xDA) {
      layout->scan = at + 2 + length;
      return components && data[at + 4] == components && layout->interval && layout->across % layout->interval == 0;
    } else if (marker != 0xC4 && marker != 0xDB && marker != 0xFE && (marker & 0xF0) != 0xE0) {
      return 0; /* another process, or a marker that has no place here */
    }
    at += 2 + length;
  }
  return 0;
}

/* Copy what stands before the entropy-coded data, but for comments and metadata. Returns the byte after it. */
static unsigned char *copy_header(const unsigned char *data, const struct layout *layout, int64_t height,
                                  int64_t width, unsigned char *to) {
  memcpy(to, data, 2);
  to += 2;
  for (uint64_t at = 2, length; at < layout->scan; at += length) {
    unsigned char marker = data[at + 1];
    length = 2 + two_bytes(data + at + 2);
    if (marker == 0xFE || (marker > 0xE0 && marker < 0xF0 && marker != 0xEE)) continue; /* JFIF's and Adobe's stay */
    memcpy(to, data + at, length);
    if (at + 5 == layout->sides) {
      to[5] = height >> 8, to[6] = height;
      to[7] = width >> 8, to[8] = width;
    }
    to += length;
  }
  return to;
}

/* The next marker of entropy-coded data, or NULL. */
static const unsigned char *next_marker(const unsigned char *at, const unsigned char *end) {
  while ((at = memchr(at, 0xFF, end - at)) && at + 1 < end) {
    if (at[1]) return at;
    at += 2;
  }
  return NULL;
}

/* ---- Huffman decoding -----------------------------------------------------------------------------------------------
 *
 * libjpeg-turbo has a fast path, but never takes it in a file with restart markers. So segments are decoded here, and
 * libjpeg, which is told to ask for MCUs here, does the rest. The zeros that JPEG puts after 0xFF are removed first, so
 * that eight bytes can be taken at once.
 */

static const unsigned char ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* A Huffman code. An entry of `look`, which the next LOOK bits find, is value << 16 | size << 12 | run << 8 | length:
 * a run of zeros and a coefficient of `size` bits. Where these are among the LOOK bits, too, `value` is the coefficient
 * and `length` counts all bits; else it is 0 and `length` counts those of the code. It is 0 for longer codes. */
struct code {
  uint32_t look[1 << LOOK];
  uint32_t end[17]; /* above all codes of that length, as 16 bits */
  int32_t offset[17];
  const UINT8 *symbols; /* run << 4 | size */
};

struct reader {
  const unsigned char *at; /* the first byte that is not in `bits` */
  uint64_t bits;           /* the next bits, from the highest */
  int count;               /* how many there are */
};

/* The segments of a crop, one after the other, and how far they are decoded. */
struct segments {
  unsigned char *data, *end; /* of the segment that is next */
  int64_t *lengths;          /* bytes */
  int64_t interval, left;    /* MCUs: of a segment, and of the present one */
  struct reader reader;
  int last[MAX_COMPS_IN_SCAN];
  struct code dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
};

/* The number that JPEG writes as the `size` highest of `bits`. */
static int number(uint64_t bits, int size) {
  int64_t plain = size ? (int64_t)(bits >> (64 - size)) : 0;
  return size && plain < 1 << (size - 1) ? plain - (1 << size) + 1 : plain;
}

static uint32_t entry_of(int symbol, int length, int value) {
  return (uint32_t)value << 16 | (symbol & 15) << 12 | symbol >> 4 << 8 | length;
}

static void make_code(struct code *code, const JHUFF_TBL *table) {
  uint32_t next = 0;
  int k = 0;
  memset(code->look, 0, sizeof code->look);
  code->symbols = table->huffval;
  for (int length = 1; length <= 16; length++, next <<= 1) {
    code->offset[length] = k - (int32_t)next;
    for (int i = 0; i < table->bits[length]; i++, k++, next++) {
      int symbol = table->huffval[k], size = symbol & 15, whole = size && length + size <= LOOK;
      for (uint32_t j = 0; length <= LOOK && j < 1u << (LOOK - length); j++)
        code->look[next << (LOOK - length) | j] =
            whole ? entry_of(symbol, length + size, number((uint64_t)j << (64 - LOOK + length), size))
                  : entry_of(symbol, length, 0);
    }
    code->end[length] = next << (16 - length);
  }
}

static void refill(struct reader *in) {
  uint64_t bytes;
  memcpy(&bytes, in->at, 8);
  in->bits |= __builtin_bswap64(bytes) >> in->count;
  in->at += (63 - in->count) >> 3;
  in->count |= 56;
}

static void drop(struct reader *in, int count) {
  in->bits <<= count;
  in->count -= count;
}

/* The entry of a code of more than LOOK bits; 0 if there is none. */
static uint32_t long_entry(const struct code *code, uint64_t bits) {
  uint32_t top = bits >> 48;
  for (int length = LOOK + 1; length <= 16; length++)
    if (top < code->end[length])
      return entry_of(code->symbols[code->offset[length] + (int32_t)(top >> (16 - length))], length, 0);
  return 0;
}

/* Read a run and a coefficient, of `code`. Returns its entry; 0 if the bits are no code. */
static inline uint32_t next_entry(struct reader *in, const struct code *code, int *value) {
  refill(in);
  uint32_t entry = code->look[in->bits >> (64 - LOOK)];
  *value = (int32_t)entry >> 16;
  if (*value) {
    drop(in, entry & 31);
    return entry;
  }
  if (!entry && !(entry = long_entry(code, in->bits))) return 0;
  int size = entry >> 12 & 15;
  drop(in, entry & 31);
  *value = number(in->bits, size);
  drop(in, size);
  return entry;
}

/* Decode 64 coefficients, in zeros that are there. Returns whether they are possible. */
static int decode_block(struct reader *from, const struct code *dc, const struct code *ac, int *last, JCOEF *block) {
  struct reader in = *from;
  int value;
  if (!next_entry(&in, dc, &value)) return 0;
  block[0] = *last += value;
  for (int k = 1; k < 64; k++) {
    uint32_t entry = next_entry(&in, ac, &value), run = entry >> 8 & 15;
    k += run;
    if (value) {
      if (k > 63) return 0;
      block[ZIGZAG[k]] = value;
    } else if (!entry) {
      return 0;
    } else if (run != 15) { /* which stands for 16 zeros; else the rest is zeros */
      break;
    }
  }
  *from = in;
  return 1;
}

/* In place of libjpeg's function: the coefficients of the next MCU; without `blocks` they are only passed over. */
static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
  struct segments *segments = jpeg->client_data;
  JBLOCK nowhere;
  if (!segments->left) {
    segments->left = segments->interval;
    segments->reader = (struct reader){.at = segments->data};
    segments->end = segments->data += *segments->lengths++;
    memset(segments->last, 0, sizeof segments->last);
  }
  for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
    int c = jpeg->MCU_membership[i];
    const jpeg_component_info *component = jpeg->cur_comp_info[c];
    const struct code *dc = segments->dc + component->dc_tbl_no, *ac = segments->ac + component->ac_tbl_no;
    if (!decode_block(&segments->reader, dc, ac, segments->last + c, blocks ? *blocks[i] : nowhere))
      leave((j_common_ptr)jpeg);
  }
  int64_t unread = 8 * (segments->end - segments->reader.at) + segments->reader.count;
  if (unread < 0 || (!--segments->left && unread > 7)) leave((j_common_ptr)jpeg);
  return TRUE;
}

/* Have libjpeg, which has read the tables, ask for these segments. */
static void use_segments(struct jpeg_decompress_struct *jpeg, struct segments *segments) {
  struct decoder { /* how jpeg_entropy_decoder begins in all versions of libjpeg, whose header is private */
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
  } *decoder = (struct decoder *)jpeg->entropy;
  for (int c = 0; c < jpeg->comps_in_scan; c++) {
    int dc = jpeg->cur_comp_info[c]->dc_tbl_no, ac = jpeg->cur_comp_info[c]->ac_tbl_no;
    if (!segments->dc[dc].symbols) make_code(segments->dc + dc, jpeg->dc_huff_tbl_ptrs[dc]);
    if (!segments->ac[ac].symbols) make_code(segments->ac + ac, jpeg->ac_huff_tbl_ptrs[ac]);
  }
  jpeg->client_data = segments;
  decoder->decode_mcu = decode_mcu;
}

/* Copy the entropy-coded bytes from `at` to `end` without the zeros after 0xFF. Returns the byte after the copy. */
static unsigned char *copy_plain(const unsigned char *at, const unsigned char *end, unsigned char *to) {
  while (at < end) {
    const unsigned char *ff = memchr(at, 0xFF, end - at);
    size_t bytes = (ff ? ff + 1 : end) - at;
    memcpy(to, at, bytes);
    at += bytes + 1;
    to += bytes;
  }
  return to;
}

/* Copy the segments of MCU rows [y0, y1), of which those in [x0, x1) of a row, and TAIL zeros. Returns whether the
 * markers are as they must be. */
static int copy_segments(const unsigned char *data, uint64_t size, const struct layout *layout, int64_t y0, int64_t y1,
                         int64_t x0, int64_t x1, int64_t *lengths, unsigned char *to) {
  const unsigned char *at = data + layout->scan, *end = data + size;
  int64_t a_row = layout->across / layout->interval, index = 0, last = layout->down * a_row - 1;
  for (int64_t y = 0; y < y1; y++)
    for (int64_t x = 0; x < a_row; x++, index++) {
      const unsigned char *marker = next_marker(at, end);
      if (!marker || marker[1] != (index == last ? 0xD9 : 0xD0 + index % 8)) return 0;
      if (y >= y0 && x >= x0 && x < x1) {
        unsigned char *after = copy_plain(at, marker, to);
        *lengths++ = after - to;
        to = after;
      }
      at = marker + 2;
    }
  memset(to, 0, TAIL);
  return 1;
}

/* ---- Decoding a box ---------------------------------------------------------------------------------------------- */

/* sam_repro_jpeg_box of one JPEG as it is, or with the entropy-coded data of `segments`; its row r is row r + down of
 * out. */
static int64_t decode_box(const unsigned char *data, uint64_t size, int64_t height, int64_t width, int64_t top,
                          int64_t left, int64_t h, int64_t w, int64_t down, struct segments *segments,
                          unsigned char *out) {
  struct jpeg_decompress_struct jpeg;
  struct failure failure;
  prepare(&jpeg, &failure);
  if (setjmp(failure.jump)) {
    jpeg_destroy_decompress(&jpeg);
    return -1;
  }
  begin(&jpeg, data, size);
  jpeg.out_color_space = JCS_EXT_RGBX;
  if (jpeg.image_height != height || jpeg.image_width != width) leave((j_common_ptr)&jpeg);
  jpeg_start_decompress(&jpeg);
  if (segments) use_segments(&jpeg, segments);
  int64_t begin_row = top > MARGIN ? top - MARGIN : 0, end_row = top + h + MARGIN;
  int64_t begin_column = left > MARGIN ? left - MARGIN : 0, end_column = left + w + MARGIN;
  if (end_row > height) end_row = height;
  if (end_column > width) end_column = width;
  JDIMENSION x = begin_column, columns = end_column - begin_column;
  if (columns < width) jpeg_crop_scanline(&jpeg, &x, &columns);
  if (begin_row) jpeg_skip_scanlines(&jpeg, begin_row);
  while (jpeg.output_scanline < end_row) {
    JSAMPROW rows[ROWS];
    JDIMENSION count = 0;
    for (; count < ROWS && jpeg.output_scanline + count < end_row; count++)
      rows[count] = out + 4 * (size_t)columns * (down + jpeg.output_scanline + count);
    jpeg_read_scanlines(&jpeg, rows, count);
  }
  long warnings = jpeg.err->num_warnings;
  jpeg_destroy_decompress(&jpeg);
  return warnings ? -1 : (int64_t)x * 65536 + columns;
}

/* Decode the box of h x w pixels at (top, left) of a JPEG of height x width pixels, as RGB and a byte without meaning.
 *
 * out has room for 4 * height * width bytes. It gets rows of `columns` pixels, of which row r is the image's row r
 * from column x on; only the box is filled. Returns x * 65536 + columns, or -1 on any error, warning or other sides.
 */
int64_t sam_repro_jpeg_box(const unsigned char *data, uint64_t size, int64_t height, int64_t width, int64_t top,
                           int64_t left, int64_t h, int64_t w, unsigned char *out) {
  struct layout l;
  if (!read_layout(data, size, &l) || l.height != height || l.width != width)
    return decode_box(data, size, height, width, top, left, h, w, 0, NULL, out);
  int64_t pixels = l.interval * l.mcu_width, a_row = l.across / l.interval;
  int64_t y0 = top > MARGIN ? (top - MARGIN) / l.mcu_height : 0, y1 = parts(top + h + MARGIN, l.mcu_height);
  int64_t x0 = left > MARGIN ? (left - MARGIN) / pixels : 0, x1 = parts(left + w + MARGIN, pixels);
  if (y1 > l.down) y1 = l.down;
  if (x1 > a_row) x1 = a_row;
  int64_t y = y0 * l.mcu_height, x = x0 * pixels, count = (y1 - y0) * (x1 - x0);
  int64_t rows = (y1 == l.down ? height : y1 * l.mcu_height) - y, columns = (x1 == a_row ? width : x1 * pixels) - x;
  struct segments *segments = calloc(1, sizeof *segments);
  int64_t *lengths = malloc(count * sizeof *lengths + size + TAIL), place = -1;
  if (segments && lengths) {
    unsigned char *header = (unsigned char *)(lengths + count), *data_to = copy_header(data, &l, rows, columns, header);
    segments->interval = l.interval;
    segments->lengths = lengths;
    segments->data = data_to;
    if (copy_segments(data, size, &l, y0, y1, x0, x1, lengths, data_to))
      place = decode_box(header, data_to - header, rows, columns, top - y, left - x, h, w, y, segments, out);
  }
  free(segments);
  free(lengths);
  return place < 0 ? -1 : place + x * 65536;
}

/* ---- Resampling -------------------------------------------------------------------------------------------------- */

typedef float four __attribute__((vector_size(16)));

/* What crop.py's _axis returns: output i is the sum over t < taps[i] of weights[i * stride + t] * input[first[i] + t].
 * There are at least two weights per output, and 0 stands where there is no tap. So two are always added. */
struct axis {
  const int64_t *first, *taps;
  const float *weights;
  int64_t stride;
};

/* The weighted sum of the rows of `bytes` bytes that make output row y. */
static void add_rows(const unsigned char *pixels, int64_t row, struct axis axis, int64_t y, int64_t bytes,
                     float *restrict to) {
  const unsigned char *first = axis.taps[y] ? pixels + axis.first[y] * row : pixels;
  const unsigned char *second = axis.taps[y] > 1 ? first + row : first;
  const float *weights = axis.weights + y * axis.stride;
  for (int64_t k = 0; k < bytes; k++) to[k] = weights[0] * first[k] + weights[1] * second[k];
  for (int64_t t = 2; t < axis.taps[y]; t++)
    for (int64_t k = 0; k < bytes; k++) to[k] += weights[t] * first[t * row + k];
}

/* The weighted sums of at most `most` pixels of a line, which begins where the axis does, plus 1/2. */
static void add_columns(const four *line, struct axis axis, int64_t most, int64_t size, int64_t flip,
                        four *restrict to) {
  for (int64_t i = 0, x = flip ? size - 1 : 0; i < size; i++, x += flip ? -1 : 1) {
    const float *weights = axis.weights + x * axis.stride;
    const four *first = line + axis.first[x] - axis.first[0];
    to[i] = 0.5f + weights[0] * first[0] + weights[1] * first[1];
    for (int64_t t = 2; t < most; t++) to[i] += weights[t] * first[t];
  }
}

static void round_down(const float *restrict from, int64_t count, unsigned char *restrict to) {
  for (int64_t k = 0; k < count; k++) to[k] = (int32_t)from[k];
}

/* crop.py's _resample for four bytes per pixel: the same arithmetic in the same order, on all colours at once.
 *
 * pixels: the box's first; a row of the image has `columns`. fill: red + 256 * green + 65536 * blue.
 * out: [size, size, 3]. Returns whether there was memory for a line.
 */
int64_t sam_repro_jpeg_resample(const unsigned char *pixels, int64_t columns, const int64_t *y_first,
                                const int64_t *y_taps, const float *y_weights, int64_t y_stride, const int64_t *x_first,
                                const int64_t *x_taps, const float *x_weights, int64_t x_stride, int64_t flip,
                                int64_t fill, int64_t size, unsigned char *out) {
  struct axis y_axis = {y_first, y_taps, y_weights, y_stride}, x_axis = {x_first, x_taps, x_weights, x_stride};
  int64_t width = x_first[size - 1] + x_taps[size - 1] - x_first[0], most = 0;
  for (int64_t i = 0; i < size; i++) most = x_taps[i] > most ? x_taps[i] : most;
  four *line = aligned_alloc(16, 16 * (width + most + 2) + 20 * (size + 4)), *sums = line + width + most + 2;
  unsigned char *rounded = (unsigned char *)(sums + size);
  if (!line) return 0;
  memset(line + width, 0, 16 * (most + 2)); /* what weights of 0 meet */
  for (int64_t y = 0; y < size; y++, out += 3 * size) {
    add_rows(pixels + 4 * x_first[0], 4 * columns, y_axis, y, 4 * width, (float *)line);
    add_columns(line, x_axis, most, size, flip, sums);
    round_down((float *)sums, 4 * size, rounded);
    for (int64_t i = 0; i < size - 1; i++) memcpy(out + 3 * i, rounded + 4 * i, 4); /* the next covers the fourth */
    memcpy(out + 3 * (size - 1), rounded + 4 * (size - 1), 3);
    for (int64_t i = 0; fill && i < size; i++)
      if (!y_taps[y] || !x_taps[flip ? size - 1 - i : i]) memcpy(out + 3 * i, &fill, 3);
  }
  free(line);
  return 1;
}

/* MCUs of a restart segment: that divisor of the MCUs of a row which comes nearest to the wanted number, by ratio. */
static int64_t restart_interval(int64_t across, double wanted) {
  int64_t best = across;
  for (int64_t i = 2; i < across; i++) {
    double ratio = i < wanted ? wanted / i : i / wanted, least = best < wanted ? wanted / best : best / wanted;
    if (across % i == 0 && ratio < least) best = i;
  }
  return best;
}

/* Code the same coefficients anew: sequential, the best Huffman tables, a restart marker about every `segment` pixels
 * of an MCU row. Metadata and comments go. Returns the bytes, or -1 on any error or warning, or without room.
 */
int64_t sam_repro_jpeg_recode(const unsigned char *data, uint64_t size, int64_t segment, unsigned char *out,
                              uint64_t room) {
  struct jpeg_decompress_struct from;
  struct jpeg_compress_struct to;
  struct failure failure;
  unsigned char *end = out;
  unsigned long bytes = room;
  prepare(&from, &failure);
  memset(&to, 0, sizeof to); /* what jpeg_destroy can bear */
  if (setjmp(failure.jump)) {
    jpeg_destroy_decompress(&from);
    jpeg_destroy_compress(&to);
    return -1;
  }
  begin(&from, data, size);
  to.err = from.err;
  jpeg_create_compress(&to);
  jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&from);
  if (from.err->num_warnings) leave((j_common_ptr)&from); /* writing sets it to 0 */
  jpeg_copy_critical_parameters(&from, &to);
  int64_t mcu = from.num_components > 1 ? 8 * from.max_h_samp_factor : 8;
  to.optimize_coding = TRUE;
  to.restart_interval = restart_interval(parts(from.image_width, mcu), (double)segment / mcu);
  jpeg_mem_dest(&to, &end, &bytes);
  jpeg_write_coefficients(&to, coefficients);
  jpeg_finish_compress(&to);
  jpeg_finish_decompress(&from);
  jpeg_destroy_compress(&to);
  jpeg_destroy_decompress(&from);
  if (end == out) return bytes;
  free(end); /* libjpeg made itself a larger buffer */
  return -1;
}
