// What LoadedKernel calls of the CUDA driver: a launch is recorded as a C program sees it.

#include <string.h>

// CUlaunchAttribute and CUlaunchConfig, as cuda.h declares them.
typedef struct {
  int id;
  char pad[8 - sizeof(int)];
  union {
    char pad[64];
    int programmatic_stream_serialization_allowed;
  } value;
} Attribute;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned attribute_count;
} Config;

enum { MOST_ARGUMENTS = 32, MOST_BYTES = 128 };

typedef struct {
  unsigned grid[3], block[3], shared_bytes, attribute_count;
  void *stream, *function, *extra;
  int attribute_id, attribute_value, device;
  unsigned char arguments[MOST_ARGUMENTS][MOST_BYTES];
} Record;

Record record;
unsigned launches, argument_count, argument_sizes[MOST_ARGUMENTS];
int answer;          // CUresult of the next launches
int current_device;  // whose context is current

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  unsigned i;
  launches++;
  memset(&record, 0, sizeof record);
  record.grid[0] = config->grid_x, record.grid[1] = config->grid_y, record.grid[2] = config->grid_z;
  record.block[0] = config->block_x, record.block[1] = config->block_y, record.block[2] = config->block_z;
  record.shared_bytes = config->shared_bytes;
  record.attribute_count = config->attribute_count;
  record.stream = config->stream, record.function = function, record.extra = extra;
  record.device = current_device;
  if (config->attribute_count) {
    record.attribute_id = config->attributes->id;
    record.attribute_value = config->attributes->value.programmatic_stream_serialization_allowed;
  }
  for (i = 0; i < argument_count; i++) memcpy(record.arguments[i], arguments[i], argument_sizes[i]);
  return answer;
}
